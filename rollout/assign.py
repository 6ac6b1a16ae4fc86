"""Which worker generates which groups."""

import heapq
from collections.abc import Sequence

import numpy as np


def assign(prompt_lengths: Sequence[int] | np.ndarray, workers: int, groups_per_table: int) -> list[list[int]]:
    """Deal groups to workers so that each has as many groups and about as many prompt tokens as the others.

    Within a worker, every table of groups_per_table groups has about the same number of prompt tokens. Returns the
    indices into prompt_lengths of each worker, in the order to generate them; deterministic.
    """
    lengths = np.asarray(prompt_lengths, np.int64)
    fewest, more = divmod(len(lengths), workers)
    shares = _deal(lengths, [fewest + (worker < more) for worker in range(workers)])
    plan = []
    for share in shares:
        full, rest = divmod(len(share), groups_per_table)
        tables = _deal(lengths[share], [groups_per_table] * full + [rest] * (rest > 0))
        plan.append([share[i] for table in tables for i in table])
    return plan


def _deal(lengths: np.ndarray, sizes: Sequence[int]) -> list[list[int]]:
    """Indices for each hand, sizes[k] for hand k: longest first, to the hand with the fewest tokens for its size."""
    hands: list[list[int]] = [[] for _ in sizes]
    tokens = [0] * len(sizes)
    emptiest = [(0.0, hand) for hand, size in enumerate(sizes) if size]
    for index in np.argsort(-lengths, kind="stable").tolist():
        _, hand = heapq.heappop(emptiest)
        hands[hand].append(index)
        tokens[hand] += int(lengths[index])
        if len(hands[hand]) < sizes[hand]:
            heapq.heappush(emptiest, (tokens[hand] / sizes[hand], hand))
    return [sorted(hand) for hand in hands]
