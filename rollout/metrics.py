"""What is logged about rollouts: how fast the engines generated, and how much the policy still explores."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

_SECONDS = b"generate_s"


def with_seconds(table: pa.Table, seconds: float) -> pa.Table:
    """A group table that carries the seconds which an engine took for it, in the metadata of its schema."""
    return table.replace_schema_metadata({_SECONDS: repr(seconds)})


def rollout_metrics(tables: Sequence[pa.Table]) -> dict[str, float]:
    """Metrics over the groups of some tables; {} without any.

    rollout/group_probability: see group_probability, mean over groups.
    rollout/groups_per_s and /tokens_per_s: groups and candidate tokens that a worker generates per second, where the
    tables carry their seconds. Of the time in which the engines work, on average over the workers. Time in which a
    worker waits, for room in its queue or for weights, is not counted, so this is what all workers together could do,
    divided by their number.
    """
    if not any(table.num_rows for table in tables):
        return {}
    found = {"rollout/group_probability": float(np.concatenate([group_probability(table) for table in tables]).mean())}
    timed = [table for table in tables if _SECONDS in (table.schema.metadata or {})]
    seconds = sum(float(table.schema.metadata[_SECONDS]) for table in timed)
    if not seconds:
        return found
    tokens = sum(len(table["candidate_tokens"].combine_chunks().flatten().flatten()) for table in timed)
    return found | {
        "rollout/groups_per_s": sum(table.num_rows for table in timed) / seconds,
        "rollout/tokens_per_s": tokens / seconds,
    }


def group_probability(table: pa.Table) -> np.ndarray:
    """float64 [n]: the probability that the policy gives to the titles of a group, each counted once.

    Near 1 it hardly knows other titles any more. What is no title does not count.
    """
    classes, logprobs = (table[name].combine_chunks() for name in ("candidate_class", "candidate_logprobs"))
    group = np.repeat(np.arange(len(table)), classes.value_lengths().to_numpy())
    tokens = logprobs.flatten()
    candidate = np.repeat(np.arange(len(tokens)), tokens.value_lengths().to_numpy())
    logprob = np.bincount(candidate, weights=tokens.flatten().to_numpy(), minlength=len(tokens))
    titles = classes.flatten().to_numpy()
    valid = np.flatnonzero(titles >= 0)
    _, first = np.unique(np.stack([group[valid], titles[valid]]), axis=1, return_index=True)
    return np.bincount(group[valid[first]], weights=np.exp(logprob[valid[first]]), minlength=len(table))
