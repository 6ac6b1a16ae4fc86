"""Dynamic sampling: which of too many samples make up a group."""

from collections.abc import Sequence

import numpy as np


def select(item_class: Sequence[int] | np.ndarray, target_class: int, group_size: int) -> np.ndarray:
    """Indices of the samples to keep, at most group_size, each of another item class.

    The target comes first if it was drawn at all, then the classes by how often they were drawn; ties go to the one
    drawn earlier. item_class: int [n], the class of each sample in the order of drawing. Of equal samples the first
    is kept. Fewer than group_size remain where fewer classes were drawn.
    """
    classes, first, count = np.unique(np.asarray(item_class), return_index=True, return_counts=True)
    order = np.lexsort((first, -count, classes != target_class))
    return first[order[:group_size]]
