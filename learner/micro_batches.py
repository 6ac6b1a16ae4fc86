"""Micro-batches: which rank feeds which groups in which forward pass."""

import heapq
from collections.abc import Sequence

Plan = list[list[list[int]]]
"""plan[rank][micro]: indices of groups. Every rank has the same number of micro-batches; some may be empty."""


def plan_micro_batches(token_counts: Sequence[int], budget: int, ranks: int) -> Plan:
    """Spread groups evenly over micro-batches of at most `budget` tokens, as few per rank as the greedy rule finds.

    token_counts: packed tokens of each group; a group above the budget gets a micro-batch of its own. Every rank gets
    the same number of micro-batches, at least one, because all ranks enter every forward pass together, and those of
    equal index are of similar size. The same arguments give the same plan on every rank.
    Raises ValueError for a budget or a number of ranks below 1.
    """
    if budget < 1 or ranks < 1:
        raise ValueError(f"micro-batches need a budget and ranks of at least 1, not {budget} tokens and {ranks} ranks")
    by_size = sorted(range(len(token_counts)), key=lambda group: (-token_counts[group], group))
    alone = [[group] for group in by_size if token_counts[group] > budget]
    rest = by_size[len(alone) :]
    steps = max(1, -(-(len(alone) + -(-sum(token_counts[group] for group in rest) // budget)) // ranks))
    while (shared := _spread(token_counts, rest, budget, steps * ranks - len(alone))) is None:
        steps += 1
    micro_batches = sorted(alone + shared, key=lambda groups: -sum(token_counts[group] for group in groups))
    return [[sorted(groups) for groups in micro_batches[rank::ranks]] for rank in range(ranks)]


def _spread(token_counts: Sequence[int], groups: Sequence[int], budget: int, bins: int) -> list[list[int]] | None:
    """Largest first, each into the emptiest of `bins`; None when that overflows a bin."""
    filled: list[list[int]] = [[] for _ in range(bins)]
    emptiest = [(0, index) for index in range(bins)]
    for group in groups:
        if not emptiest or emptiest[0][0] + token_counts[group] > budget:
            return None
        tokens, index = emptiest[0]
        filled[index].append(group)
        heapq.heapreplace(emptiest, (tokens + token_counts[group], index))
    return filled
