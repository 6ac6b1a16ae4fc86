"""What a reward sees: groups with their titles, users and histories."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, overload

import numpy as np
import pyarrow as pa

from rewards.layout import Layout

NO_TITLE = -1
"""Item class of a candidate that is no title; only unconstrained rollouts have such candidates."""


class Examples(Protocol):
    """What rewards need of one split of a catalogue."""

    @property
    def target_class(self) -> np.ndarray:
        """int32 [n]"""
        ...

    def __len__(self) -> int: ...

    def user_id(self, i: int) -> str: ...

    def history_classes(self, i: int) -> Sequence[int] | np.ndarray: ...


class TitleCatalog(Protocol):
    """What rewards need of a catalogue; `catalog.catalog.Catalog` has it all."""

    @property
    def num_classes(self) -> int: ...

    def title(self, item_class: int) -> str: ...

    def examples(self, split: str) -> Examples: ...


def all_titles(catalog: TitleCatalog) -> list[str]:
    """Every title, by item class."""
    return [catalog.title(item_class) for item_class in range(catalog.num_classes)]


def titles_fingerprint(titles: Sequence[str]) -> str:
    """16 hexadecimal digits: what binds embeddings and recommenders to item classes, whatever the tokenizer."""
    return hashlib.sha256(json.dumps(list(titles)).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Group:
    """One prompt and its G candidates, rank 0 first."""

    example_id: int
    """Row of the example in its split."""
    policy_version: int
    """RL steps in the weights that produced the candidates."""
    user_id: str
    history_titles: list[str]
    """Titles of the user's history, oldest first; the prompt shows them as far as data.max_prompt_tokens allows."""
    history_classes: list[int]
    """Item classes (distinct titles) of the history."""
    target_title: str
    """What the user chose next."""
    target_class: int
    candidate_titles: list[str]
    """G titles; "" for a candidate that is no title (unconstrained rollouts only)."""
    candidate_classes: list[int]
    """G item classes; -1 for a candidate that is no title."""
    candidate_tokens: list[list[int]]
    """Tokens of the G candidates, end-of-sequence included unless an unconstrained text was cut off."""
    scores: list[float]
    """What the candidates are ordered by: the summed log-probability of each one's tokens."""


class Groups(Sequence[Group]):
    """The groups of one table. A group is built when it is asked for, so whole-table rewards pay nothing for it.

    >>> groups = Groups(table, catalog, "train")
    >>> groups[0].target_title
    >>> groups.table                       # the Arrow table itself, in rollout.groups.GROUP_SCHEMA
    """

    def __init__(self, table: pa.Table, catalog: TitleCatalog, split: str) -> None:
        self.table = table
        self.catalog = catalog
        self.split = split

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self.table)

    @cached_property
    def example_ids(self) -> np.ndarray:
        """int64 [n]"""
        return self.table["example_id"].to_numpy()

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, row: int) -> Group: ...

    @overload
    def __getitem__(self, row: slice) -> "Groups": ...

    def __getitem__(self, row: int | slice) -> "Group | Groups":
        if isinstance(row, slice):
            rows = range(len(self))[row]
            return Groups(self.table.take(pa.array(rows, pa.int64())), self.catalog, self.split)
        return self._group(range(len(self))[row])

    def __iter__(self) -> Iterator[Group]:
        return map(self._group, range(len(self)))

    def _group(self, row: int) -> Group:
        start, end = self.layout.offsets[row : row + 2]
        example_id = int(self.example_ids[row])
        classes = self._classes[start:end].tolist()
        history = [int(item_class) for item_class in self._examples.history_classes(example_id)]
        target = int(self._targets[row])
        return Group(
            example_id=example_id,
            policy_version=int(self._versions[row]),
            user_id=self._examples.user_id(example_id),
            history_titles=[self.catalog.title(item_class) for item_class in history],
            history_classes=history,
            target_title=self.catalog.title(target),
            target_class=target,
            candidate_titles=["" if c == NO_TITLE else self.catalog.title(c) for c in classes],
            candidate_classes=classes,
            candidate_tokens=self._tokens[start:end].to_pylist(),
            scores=self._scores[start:end].tolist(),
        )

    @cached_property
    def _examples(self) -> Examples:
        return self.catalog.examples(self.split)

    @cached_property
    def _classes(self) -> np.ndarray:
        return self.layout.flat(self.table["candidate_class"])

    @cached_property
    def _scores(self) -> np.ndarray:
        return self.layout.flat(self.table["score"])

    @cached_property
    def _targets(self) -> np.ndarray:
        return self.table["target_class"].to_numpy()

    @cached_property
    def _versions(self) -> np.ndarray:
        return self.table["policy_version"].to_numpy()

    @cached_property
    def _tokens(self) -> pa.ListArray:
        return self.table["candidate_tokens"].combine_chunks().flatten()
