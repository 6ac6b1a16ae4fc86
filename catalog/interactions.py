"""Items and examples before they are tokenised, whether read from files or generated."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from catalog.ragged import Ragged

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class SplitTable:
    """The examples of one split, in the order in which they came. An item is its row in Interactions.titles."""

    user_id: pa.LargeStringArray
    """[n]"""
    history: Ragged
    """n lists of items, oldest first, at least one each."""
    target: np.ndarray
    """int32 [n]: the item that followed."""
    timestamp: np.ndarray
    """int64 [n]: seconds since 1970, or the position in the user's sequence where the data has no times."""
    best_rank: np.ndarray | None = None
    """int32 [n]: rank of the target's title in the best possible ranking; known for generated data only."""

    def __len__(self) -> int:
        return len(self.target)


@dataclass(frozen=True)
class Interactions:
    """A catalogue of items and what users did with them."""

    item_ids: pa.Array
    """[items]: the ids of the data, integers or strings."""
    titles: pa.LargeStringArray
    """[items]"""
    splits: dict[str, SplitTable]


def cut_by_time(timestamp: np.ndarray) -> dict[str, slice]:
    """Rows of each split when examples in time order are cut 80/10/10. timestamp [n] must not decrease."""
    n = len(timestamp)
    first, second = int(n * 0.8), int(n * 0.9)
    return {"train": slice(0, first), "valid": slice(first, second), "test": slice(second, n)}


def sliding_histories(items: np.ndarray, lengths: np.ndarray, max_history: int) -> tuple[np.ndarray, Ragged]:
    """One example per position of each sequence but its first: (position of the target in `items`, its history).

    items [total]: the sequences one behind the other; lengths [sequences]. A history is the up to max_history items
    before the target in the same sequence.
    """
    start = np.cumsum(lengths) - lengths
    within = np.arange(len(items)) - np.repeat(start, lengths)
    targets = np.flatnonzero(within > 0)
    sizes = np.minimum(within[targets], max_history)
    offsets = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return targets, Ragged.from_lengths(items[np.repeat(targets - sizes, sizes) + offsets].astype(np.int32), sizes)
