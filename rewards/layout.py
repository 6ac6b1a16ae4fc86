"""All candidates of a table as one array: what makes rewards vectorised over groups of any size."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Layout:
    """Where the candidates of n groups lie when they stand one group after another, N in all.

    >>> layout = Layout.of(table)
    >>> layout.flat(table["candidate_class"])       # int32 [N]
    >>> layout.column(values)                       # float32 [N] -> list<float32> of n rows
    """

    offsets: np.ndarray
    """int32 [n + 1]: candidates of group g are offsets[g] : offsets[g + 1]."""

    @classmethod
    def of(cls, table: pa.Table) -> "Layout":
        """The layout of a group table; only `candidate_class` is looked at."""
        sizes = _combined(table["candidate_class"]).value_lengths().to_numpy(zero_copy_only=False)
        return cls(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))

    @property
    def num_groups(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_candidates(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def sizes(self) -> np.ndarray:
        """int32 [n]"""
        return np.diff(self.offsets)

    @cached_property
    def group(self) -> np.ndarray:
        """int64 [N]: the group of each candidate."""
        return np.repeat(np.arange(self.num_groups), self.sizes)

    @cached_property
    def rank(self) -> np.ndarray:
        """int64 [N]: the rank of each candidate in its group, 0 first."""
        return np.arange(self.num_candidates) - np.repeat(self.offsets[:-1], self.sizes)

    def flat(self, lists: pa.ChunkedArray | pa.ListArray) -> np.ndarray:
        """[N]: a list column of the table as one array."""
        return _combined(lists).flatten().to_numpy(zero_copy_only=False)

    def column(self, values: np.ndarray) -> pa.ListArray:
        """list<float32> of n rows from values [N]."""
        return pa.ListArray.from_arrays(pa.array(self.offsets), pa.array(values.astype(np.float32, copy=False)))

    def sum(self, values: np.ndarray) -> np.ndarray:
        """float64 [n]: the sum of values [N] in each group."""
        return np.bincount(self.group, weights=values, minlength=self.num_groups)

    def any(self, mask: np.ndarray) -> np.ndarray:
        """bool [n]: whether mask [N] holds for some candidate of each group."""
        found = np.zeros(self.num_groups, bool)
        found[self.group[mask]] = True
        return found


def _combined(lists: pa.ChunkedArray | pa.ListArray) -> pa.ListArray:
    return lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
