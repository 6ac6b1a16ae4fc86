"""Supervised examples, ordered so that those that share a history are packed together."""

from collections.abc import Iterator, Sequence

import numpy as np

from catalog.catalog import Examples
from catalog.trie import Trie
from learner.config import Packing
from learner.micro_batches import Plan, plan_micro_batches


class SupervisedExamples:
    """Prompts with the title that followed: user by user, each user's from the shortest history on.

    A prompt then repeats most of the one before it, and what is repeated is fed once per micro-batch.

    >>> data = SupervisedExamples(catalog.examples("train"), catalog.trie)
    >>> for batch in data.batches(size=128, seed=(seed, epoch)):           # int64 [<= 128] each
    ...     plan = data.plan(batch, budget=4096, ranks=2)
    """

    def __init__(self, examples: Examples, trie: Trie, limit: int = 0):
        """limit: take about that many examples, evenly spaced over the split; 0 takes all."""
        count = len(examples)
        chosen = np.unique(np.linspace(0, count - 1, limit).astype(int)) if 0 < limit < count else np.arange(count)
        users = examples.users(chosen)
        order = np.lexsort((examples.prompt_lengths[chosen], users))
        self._examples, self._rows = examples, chosen[order]
        targets, self._target = np.unique(examples.target_class[self._rows], return_inverse=True)
        self._titles = trie.titles(targets)
        self.user = users[order]
        """int64 [n]: ascending."""
        self.own_tokens = self._own_tokens()
        """int64 [n]: tokens that an example adds to a packed row behind the one before it."""

    def __len__(self) -> int:
        return len(self._rows)

    def prompt(self, row: int) -> np.ndarray:
        """int32 [P]"""
        return self._examples.prompt_tokens(self._rows[row])

    def title(self, row: int) -> np.ndarray:
        """int32 [T], end-of-sequence included."""
        return self._titles[self._target[row]]

    def title_tokens(self, rows: np.ndarray) -> int:
        """Tokens of the titles at `rows`, which the loss is a mean over."""
        return int(self._titles.lengths_of(self._target[rows]).sum())

    def batches(self, size: int, seed: int | Sequence[int]) -> Iterator[np.ndarray]:
        """All examples once, in batches of `size` (the last may be smaller): users shuffled, a user's together."""
        shuffled = np.random.default_rng(seed).permutation(self.user[-1] + 1)[self.user]
        order = np.argsort(shuffled, kind="stable")
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def plan(self, batch: np.ndarray, budget: int, ranks: int, packing: Packing = "tree") -> list[list[np.ndarray]]:
        """plan[rank][micro]: examples of `batch`; a user's stay together where they fit into `budget` tokens.

        Of padded batches each example counts as long as the longest of `batch`.
        """
        if packing == "padded":
            width = max(len(self.prompt(row)) + len(self.title(row)) for row in batch)
            runs, sizes = [np.array([row]) for row in np.sort(batch)], [width] * len(batch)
        else:
            runs = list(self._runs(np.sort(batch), budget))
            sizes = [self._tokens(run) for run in runs]
        plan: Plan = plan_micro_batches(sizes, budget, ranks)
        return [
            [np.concatenate([runs[run] for run in micro]) if micro else np.empty(0, int) for micro in micros]
            for micros in plan
        ]

    def _runs(self, batch: np.ndarray, budget: int) -> Iterator[np.ndarray]:
        """Consecutive examples of one user, cut where they exceed the budget. batch: ascending."""
        start = 0
        for end in range(1, len(batch) + 1):
            new_user = end == len(batch) or self.user[batch[end]] != self.user[batch[start]]
            if new_user or self._tokens(batch[start : end + 1]) > budget:
                yield batch[start:end]
                start = end

    def _tokens(self, run: np.ndarray) -> int:
        """Packed tokens of consecutive examples of one user, as if the first shared nothing."""
        first = len(self.prompt(run[0])) + len(self.title(run[0]))
        return first + int(self.own_tokens[run[1:]].sum())

    def _own_tokens(self) -> np.ndarray:
        own = np.empty(len(self), np.int64)
        before = np.empty(0, np.int32)
        for i in range(len(self)):
            prompt = self.prompt(i)
            size = min(len(before), len(prompt))
            different = np.flatnonzero(before[:size] != prompt[:size])
            shared = int(different[0]) if len(different) else size
            own[i] = len(prompt) + len(self.title(i)) - shared
            before = prompt
        return own
