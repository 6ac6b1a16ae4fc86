"""The law behind the generated users: what they choose next, and the best ranking that anyone could show them.

A user prefers one department z. The next title follows the last one along `successors` with probability FOLLOW, and
is drawn from `preference[z]` otherwise. The first title is drawn from the chain's stationary distribution under z,
so that a window of a sequence has the same law wherever it begins, and the probability of the next title given
the history that a prompt shows can be computed exactly, without knowing what came before it.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from catalog.product_titles import DEPARTMENTS, Titles
from catalog.ragged import Ragged

FOLLOW = 0.65
"""Probability that a user follows a transition of the last title."""
SUCCESSOR_WEIGHTS = np.array([0.5, 0.25, 0.15, 0.1])
"""Of a title's successors: of its family, its brand, its department, the whole catalogue."""
IN_DEPARTMENT = 0.9
"""Share of a preference that stays in the preferred department."""
POPULARITY_EXPONENT = 1.0
"""The title of popularity rank r is preferred in proportion to r ** -POPULARITY_EXPONENT."""
STEPS_TO_STATIONARY = math.ceil(math.log(1e-14) / math.log(FOLLOW))
CELLS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Markov:
    """C titles, Z departments, S successors per title."""

    successors: np.ndarray
    """int64 [C, S]"""
    preference: np.ndarray
    """float64 [Z, C], rows sum to 1."""

    @classmethod
    def over(cls, titles: Titles, draw: np.random.Generator) -> "Markov":
        """Random successors and popularities that go with the titles' families, brands and departments."""
        everything = np.zeros(len(titles.text), np.int64)
        groups = (titles.family, titles.brand, titles.department, everything)
        popularity = (1.0 + draw.permutation(len(titles.text))) ** -POPULARITY_EXPONENT
        by_department = np.stack([popularity * (titles.department == z) for z in range(len(DEPARTMENTS))])
        by_department /= by_department.sum(1, keepdims=True)
        return cls(
            successors=np.stack([_another_member(group, draw) for group in groups], axis=1),
            preference=IN_DEPARTMENT * by_department + (1 - IN_DEPARTMENT) * popularity / popularity.sum(),
        )

    @cached_property
    def stationary(self) -> np.ndarray:
        """float64 [Z, C]: how often each title occurs in a user's sequence; the chain forgets at rate FOLLOW."""
        from scipy.sparse import csr_array  # every command imports this module, and only new data needs that one

        titles, slots = self.successors.shape
        follow = csr_array(
            (np.tile(SUCCESSOR_WEIGHTS, titles), self.successors.ravel(), np.arange(titles + 1) * slots),
            shape=(titles, titles),
        )
        distribution = self.preference
        for _ in range(STEPS_TO_STATIONARY):
            distribution = FOLLOW * (distribution @ follow) + (1 - FOLLOW) * self.preference
        return distribution / distribution.sum(1, keepdims=True)

    def sample(self, lengths: np.ndarray, draw: np.random.Generator) -> Ragged:
        """One sequence of titles per user; lengths [users]."""
        users = len(lengths)
        z = draw.integers(len(self.preference), size=users)
        sequence = np.empty((users, int(lengths.max())), np.int64)
        sequence[:, 0] = _draw_rows(self.stationary, z, draw)
        for t in range(1, sequence.shape[1]):
            slot = draw.choice(len(SUCCESSOR_WEIGHTS), size=users, p=SUCCESSOR_WEIGHTS)
            followed = self.successors[sequence[:, t - 1], slot]
            sequence[:, t] = np.where(draw.random(users) < FOLLOW, followed, _draw_rows(self.preference, z, draw))
        shown = np.arange(sequence.shape[1]) < lengths[:, None]
        return Ragged.from_lengths(sequence[shown].astype(np.int32), lengths)

    def department_given(self, histories: Ragged) -> np.ndarray:
        """float64 [n, Z]: posterior of the preferred department given each history of titles (at least one each)."""
        now = histories.flat
        likelihood = np.log(self.stationary[:, now])
        later = np.ones(len(now), bool)
        later[histories.start[:-1]] = False
        steps = np.flatnonzero(later)
        followed = ((self.successors[now[steps - 1]] == now[steps, None]) * SUCCESSOR_WEIGHTS).sum(1)
        likelihood[:, steps] = np.log(FOLLOW * followed + (1 - FOLLOW) * self.preference[:, now[steps]])
        likelihood = np.add.reduceat(likelihood, histories.start[:-1], axis=1)
        posterior = np.exp(likelihood - likelihood.max(0))
        return (posterior / posterior.sum(0)).T

    def next_given(self, histories: Ragged) -> np.ndarray:
        """float64 [n, C]: probability of the next title given each history of titles."""
        last = histories.flat[histories.start[1:] - 1]
        probability = (1 - FOLLOW) * (self.department_given(histories) @ self.preference)
        rows = np.arange(len(histories))
        for slot, weight in enumerate(SUCCESSOR_WEIGHTS):  # a title may be a successor twice: one slot at a time
            probability[rows, self.successors[last, slot]] += FOLLOW * weight
        return probability

    def best_rank(self, histories: Ragged, target: np.ndarray) -> np.ndarray:
        """int32 [n]: rank of each target when all titles are ordered by next_given; equal ones by their number."""
        rows_at_once = max(1, CELLS_AT_ONCE // len(self.successors))
        ranks = np.empty(len(target), np.int32)
        for first in range(0, len(target), rows_at_once):
            rows = np.arange(first, min(first + rows_at_once, len(target)))
            probability = self.next_given(histories.take(rows))
            own = probability[np.arange(len(rows)), target[rows]][:, None]
            before = np.arange(probability.shape[1]) < target[rows][:, None]
            ranks[rows] = ((probability > own) | ((probability == own) & before)).sum(1)
        return ranks


def _another_member(group: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """int64 [C]: for each title a random other one of its group, or of the catalogue where it is alone."""
    order = np.argsort(group, kind="stable")
    _, first, size = np.unique(group[order], return_index=True, return_counts=True)
    place = np.empty(len(group), np.int64)
    place[order] = np.arange(len(group)) - np.repeat(first, size)
    which = np.searchsorted(np.unique(group), group)
    step = 1 + draw.integers(np.maximum(size[which] - 1, 1))
    inside = order[first[which] + (place + step) % size[which]]
    anywhere = (np.arange(len(group)) + 1 + draw.integers(len(group) - 1, size=len(group))) % len(group)
    return np.where(size[which] > 1, inside, anywhere)


def _draw_rows(distribution: np.ndarray, rows: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """int64 [n]: one draw from distribution[rows[i]] for each i, by inverting all rows' cumulative sums at once."""
    cumulative = np.cumsum(distribution / distribution.sum(1, keepdims=True), axis=1)
    cumulative[:, -1] = 1.0
    stacked = (cumulative + np.arange(len(distribution))[:, None]).ravel()
    found = np.searchsorted(stacked, rows + draw.random(len(rows)), side="right")
    return np.minimum(found - rows * distribution.shape[1], distribution.shape[1] - 1)
