"""The group table: what crosses from rollouts to rewards and on to the learner."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

GROUP_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.int64(), nullable=False),
        pa.field("policy_version", pa.int64(), nullable=False),
        pa.field("prompt_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("target_class", pa.int32(), nullable=False),
        pa.field("candidate_class", pa.list_(pa.int32()), nullable=False),
        pa.field("candidate_tokens", pa.list_(pa.list_(pa.int32())), nullable=False),
        pa.field("candidate_logprobs", pa.list_(pa.list_(pa.float32())), nullable=False),
        pa.field("score", pa.list_(pa.float32()), nullable=False),
    ]
)
"""One row per group: a prompt with its candidates in the order of the search, rank 0 first.

policy_version: RL steps in the weights. candidate_class is -1 for a candidate that is no title (unconstrained
rollouts only). candidate_tokens include the end-of-sequence token, except in an unconstrained text that was cut off;
candidate_logprobs has one value for each of them under the policy of policy_version, and score orders the candidates.
`stochastic_beam` adds the column INCLUSION_WEIGHT, and rewards add columns of list<float32>, one value per candidate.
"""

INCLUSION_WEIGHT = "inclusion_weight"
"""list<float32>: see Candidates.inclusion_weight."""


@dataclass(frozen=True)
class Candidates:
    """The candidates of one group, rank 0 first: G of each, or fewer (see docs/strategies.md)."""

    tokens: Sequence[np.ndarray]
    """int32 [T_i] each, end-of-sequence included where the text was not cut off."""
    logprobs: Sequence[np.ndarray]
    """float32 [T_i] each, log-probability of every token under the rollout policy."""
    item_class: np.ndarray
    """int32 [G], -1 where the tokens are no title."""
    score: np.ndarray
    """float32 [G], what the candidates of an engine are ordered by: the summed log-probability."""
    inclusion_weight: np.ndarray | None = None
    """float32 [G], of `stochastic_beam` only: sum(weight * f) estimates the mean of f under the policy, unbiased.

    The policy over titles: at temperature 1, renormalised over the allowed tokens at every node.
    """

    def take(self, index: np.ndarray) -> "Candidates":
        """Some of the candidates, in that order. index: int [n]."""
        weight = self.inclusion_weight
        return Candidates(
            tokens=[self.tokens[i] for i in index],
            logprobs=[self.logprobs[i] for i in index],
            item_class=self.item_class[index],
            score=self.score[index],
            inclusion_weight=None if weight is None else weight[index],
        )


class GroupTableError(ValueError):
    """A group table breaks its schema; the message names the column and the row."""


def group_table(
    example_ids: Sequence[int],
    policy_version: int,
    prompts: Sequence[Sequence[int] | np.ndarray],
    target_classes: Sequence[int],
    groups: Sequence[Candidates],
) -> pa.Table:
    """One table of len(groups) rows in GROUP_SCHEMA; all sequences have that length."""
    columns = {
        "example_id": example_ids,
        "policy_version": [policy_version] * len(groups),
        "prompt_tokens": prompts,
        "target_class": target_classes,
        "candidate_class": [group.item_class for group in groups],
        "candidate_tokens": [list(group.tokens) for group in groups],
        "candidate_logprobs": [list(group.logprobs) for group in groups],
        "score": [group.score for group in groups],
    }
    arrays = [pa.array(columns[field.name], type=field.type) for field in GROUP_SCHEMA]
    table = pa.Table.from_arrays(arrays, schema=GROUP_SCHEMA)
    weights = [group.inclusion_weight for group in groups]
    if not groups or any(weight is None for weight in weights):
        return table
    field = pa.field(INCLUSION_WEIGHT, pa.list_(pa.float32()), nullable=False)
    return table.append_column(field, pa.array(weights, type=field.type))


def validate_groups(table: pa.Table) -> None:
    """Raise GroupTableError unless `table` has GROUP_SCHEMA's columns (more may follow) and consistent lengths.

    Every group must have a candidate, and every score be finite. Looks at offsets and scores only, so it costs
    microseconds per table.
    """
    for field in GROUP_SCHEMA:
        if field.name not in table.column_names:
            raise GroupTableError(f"group table: column {field.name!r} is missing; it has {table.column_names}")
        if table.schema.field(field.name).type != field.type:
            found = table.schema.field(field.name).type
            raise GroupTableError(f"group table: column {field.name!r} is {found}, expected {field.type}")
        if table.column(field.name).null_count:
            raise GroupTableError(f"group table: column {field.name!r} has nulls")
    sizes = _list_sizes(table, "candidate_class")
    if len(empty := np.flatnonzero(sizes == 0)):
        row = int(empty[0])
        raise GroupTableError(f"group table: row {row} (example {table['example_id'][row]}) has no candidates")
    for name in table.column_names:
        if name in ("prompt_tokens", "candidate_class") or not pa.types.is_list(table.schema.field(name).type):
            continue
        wrong = np.flatnonzero(_list_sizes(table, name) != sizes)
        if len(wrong):
            row = int(wrong[0])
            raise GroupTableError(
                f"group table: row {row} (example {table['example_id'][row]}) has {sizes[row]} candidates "
                f"but {_list_sizes(table, name)[row]} values in {name!r}"
            )
    tokens, logprobs = (table[name].combine_chunks().flatten() for name in ("candidate_tokens", "candidate_logprobs"))
    if not np.array_equal(tokens.value_lengths().to_numpy(), logprobs.value_lengths().to_numpy()):
        raise GroupTableError("group table: candidate_tokens and candidate_logprobs differ in length")
    scores = table["score"].combine_chunks().flatten().to_numpy()
    if len(wrong := np.flatnonzero(~np.isfinite(scores))):
        row = int(np.searchsorted(sizes.cumsum(), wrong[0], side="right"))
        raise GroupTableError(
            f"group table: row {row} (example {table['example_id'][row]}) has a score of {scores[wrong[0]]}"
        )


def _list_sizes(table: pa.Table, name: str) -> np.ndarray:
    return table[name].combine_chunks().value_lengths().to_numpy()
