"""Rewarded groups as the learner reads them: views into the Arrow tables of one step."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from rollout.groups import INCLUSION_WEIGHT, GroupTableError, validate_groups


@dataclass(frozen=True)
class Experience:
    """n groups; everything is a read-only view into the tables."""

    prompts: list[Sequence[int]]
    """int32 [P_i] each."""
    candidates: list[list[Sequence[int]]]
    """candidates[i][rank]: int32 [T], end-of-sequence included."""
    logprobs: list[list[np.ndarray]]
    """float32 [T], as `candidates`: under the policy that generated them."""
    rewards: list[np.ndarray]
    """float32 [G_i] each."""
    inclusion_weights: list[np.ndarray] | None = None
    """float32 [G_i] each, where the candidates come from stochastic beams."""

    @classmethod
    def from_tables(cls, tables: Sequence[pa.Table]) -> "Experience":
        """Tables in GROUP_SCHEMA with a `reward` column. Raises GroupTableError naming the column that is missing."""
        for table in tables:
            validate_groups(table)
            if "reward" not in table.column_names:
                raise GroupTableError(f"group table: column 'reward' is missing; it has {table.column_names}")
        names = tables[0].column_names
        table = pa.concat_tables([table.select(names) for table in tables]).combine_chunks()
        return cls(
            prompts=_lists(table, "prompt_tokens"),
            candidates=_nested(table, "candidate_tokens"),
            logprobs=_nested(table, "candidate_logprobs"),
            rewards=_lists(table, "reward"),
            inclusion_weights=_lists(table, INCLUSION_WEIGHT) if INCLUSION_WEIGHT in names else None,
        )

    def __len__(self) -> int:
        return len(self.prompts)


def _column(table: pa.Table, name: str) -> pa.ListArray:
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _cut(values: np.ndarray, offsets: np.ndarray) -> list[Any]:
    return [values[start:end] for start, end in pairwise(offsets)]


def _lists(table: pa.Table, name: str) -> list[Any]:
    column = _column(table, name)
    return _cut(column.values.to_numpy(), column.offsets.to_numpy())


def _nested(table: pa.Table, name: str) -> list[list[Any]]:
    outer = _column(table, name)
    inner = outer.values
    pieces = _cut(inner.values.to_numpy(), inner.offsets.to_numpy())
    offsets = outer.offsets.to_numpy()
    return [pieces[start:end] for start, end in pairwise(offsets)]
