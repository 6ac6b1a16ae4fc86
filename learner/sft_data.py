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
        _, users = np.unique([examples.user_id(int(i)) for i in chosen], return_inverse=True)
        order = np.lexsort((examples.prompt_lengths[chosen], users))
        targets = examples.target_class[chosen[order]].tolist()
        title_of = {target: np.asarray(trie.title_tokens(target), np.int32) for target in set(targets)}

        self.prompts = [examples.prompt_tokens(int(i)) for i in chosen[order]]
        """int32 [P] each."""
        self.titles = [title_of[target] for target in targets]
        """int32 [T] each, end-of-sequence included."""
        self.user = users[order]
        """int64 [n]: ascending."""
        self.own_tokens = self._own_tokens()
        """int64 [n]: tokens that an example adds to a packed row behind the one before it."""

    def __len__(self) -> int:
        return len(self.prompts)

    def title_tokens(self, rows: np.ndarray) -> int:
        """Tokens of the titles at `rows`, which the loss is a mean over."""
        return sum(len(self.titles[row]) for row in rows)

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
            width = max(len(self.prompts[row]) + len(self.titles[row]) for row in batch)
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
        first = len(self.prompts[run[0]]) + len(self.titles[run[0]])
        return first + int(self.own_tokens[run[1:]].sum())

    def _own_tokens(self) -> np.ndarray:
        own = np.empty(len(self), np.int64)
        before = np.empty(0, np.int32)
        for i, (prompt, title) in enumerate(zip(self.prompts, self.titles, strict=True)):
            size = min(len(before), len(prompt))
            different = np.flatnonzero(before[:size] != prompt[:size])
            shared = int(different[0]) if len(different) else size
            own[i] = len(prompt) + len(title) - shared
            before = prompt
        return own
