"""Lists of different lengths as two flat arrays, so that a million of them cost no Python objects."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Ragged:
    """List i is flat[start[i] : start[i + 1]].

    >>> lists = Ragged.from_lists([[1, 2], [], [3]])
    >>> lists[0], lists.lengths
    (array([1, 2], dtype=int32), array([2, 0, 1]))
    """

    flat: np.ndarray
    """int32 [total]"""
    start: np.ndarray
    """int64 [n + 1]"""

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int] | np.ndarray]) -> "Ragged":
        lengths = np.fromiter((len(values) for values in lists), np.int64, len(lists))
        flat = np.fromiter(chain.from_iterable(lists), np.int32, int(lengths.sum()))
        return cls.from_lengths(flat, lengths)

    @classmethod
    def from_lengths(cls, flat: np.ndarray, lengths: np.ndarray) -> "Ragged":
        """flat [total] cut into consecutive lists of `lengths` [n]."""
        return cls(flat, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    @classmethod
    def concatenate(cls, parts: Iterable["Ragged"]) -> "Ragged":
        """The lists of all `parts`, in order. Each part is let go as soon as it has been copied."""
        waiting = deque(parts)
        if not waiting:
            return cls.from_lists([])
        lengths = np.concatenate([part.lengths for part in waiting])
        flat, end = np.empty(int(lengths.sum()), np.int32), 0
        while waiting:
            part = waiting.popleft().flat
            flat[end : end + len(part)] = part
            end += len(part)
        return cls.from_lengths(flat, lengths)

    @classmethod
    def from_arrow(cls, lists: pa.LargeListArray | pa.ListArray) -> "Ragged":
        """Zero-copy where the values are int32 and the offsets 64 bits wide."""
        start = lists.offsets.to_numpy().astype(np.int64, copy=False)
        flat = lists.values.to_numpy().astype(np.int32, copy=False)
        return cls(flat[start[0] : start[-1]], start - start[0] if start[0] else start)

    def to_arrow(self) -> pa.LargeListArray:
        return pa.LargeListArray.from_arrays(self.start, pa.array(self.flat, pa.int32()))

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.flat[self.start[i] : self.start[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n]"""
        return np.diff(self.start)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """int64: `lengths` at `rows`."""
        return self.start[rows + 1] - self.start[rows]

    def take(self, rows: np.ndarray) -> "Ragged":
        """The lists at `rows`, copied."""
        lengths = self.lengths_of(rows)
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return Ragged.from_lengths(self.flat[np.repeat(self.start[rows], lengths) + within], lengths)

    def last(self, count: int) -> "Ragged":
        """The last `count` values of every list."""
        lengths = np.minimum(self.lengths, count)
        keep = np.arange(len(self.flat)) >= np.repeat(self.start[1:] - lengths, self.lengths)
        return Ragged.from_lengths(self.flat[keep], lengths)

    def append(self, value: int) -> "Ragged":
        """Every list with `value` behind it."""
        return Ragged(np.insert(self.flat, self.start[1:], value), self.start + np.arange(len(self.start)))
