"""What is logged about rollouts: how fast the engines generated."""

from collections.abc import Sequence

import pyarrow as pa

_SECONDS = b"generate_s"


def with_seconds(table: pa.Table, seconds: float) -> pa.Table:
    """A group table that carries the seconds which an engine took for it, in the metadata of its schema."""
    return table.replace_schema_metadata({_SECONDS: repr(seconds)})


def rollout_metrics(tables: Sequence[pa.Table]) -> dict[str, float]:
    """Groups and candidate tokens per second that a worker generates; {} without a table that carries its seconds.

    Of the time in which the engines work, on average over the workers. Time in which a worker waits, for room in its
    queue or for weights, is not counted, so this is what all workers together could do, divided by their number.
    """
    timed = [table for table in tables if _SECONDS in (table.schema.metadata or {})]
    seconds = sum(float(table.schema.metadata[_SECONDS]) for table in timed)
    if not seconds:
        return {}
    tokens = sum(len(table["candidate_tokens"].combine_chunks().flatten().flatten()) for table in timed)
    return {
        "rollout/groups_per_s": sum(table.num_rows for table in timed) / seconds,
        "rollout/tokens_per_s": tokens / seconds,
    }
