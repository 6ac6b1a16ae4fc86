"""Beam search of one group, driven by whichever trie nodes happen to be scored: no model, no tensors."""

from dataclasses import dataclass

import numpy as np

from catalog.trie import Trie
from rollout.groups import Candidates

History = tuple["History | None", float]
"""Log-probabilities of a beam's tokens, newest first, sharing what beams have in common."""


@dataclass(frozen=True)
class _Beam:
    score: float
    target: int
    """Trie node, or -1 - item_class for a finished title."""
    history: History | None


class GroupBeam:
    """Hugging Face's beam search at length penalty 0, as far as the scored nodes allow.

    Of the 2G best continuations of the running beams, those that end a title and rank among the first G enter the
    pool of the best G, and the first G others run on; the search ends when no running beam can beat the worst of a
    full pool. Ties: the earlier beam, then the lower token; what is in the pool stays before what comes.

    >>> search = GroupBeam(trie, beams=16)
    >>> while nodes := search.advance():             # running nodes that are not scored yet
    ...     for node in nodes: search.score(node, {token: logprob, ...})
    >>> search.result()
    """

    def __init__(self, trie: Trie, beams: int) -> None:
        self._trie = trie
        self._beams = beams
        self._children: dict[int, list[tuple[float, int]]] = {}
        self._running = [_Beam(0.0, 0, None)]
        self._pool: list[_Beam] = []
        self.depth = 0
        """Of the running beams."""

    def score(self, node: int, logprobs: dict[int, float]) -> None:
        """The children of `node` by token: all of them, or the 2G best and whatever else (it is ignored).

        One of log-probability -inf never comes.
        """
        tokens, targets = self._trie.children(node)
        self._children[node] = [
            (logprobs[token], target)
            for token, target in zip(tokens.tolist(), targets.tolist(), strict=True)
            if logprobs.get(token, -np.inf) != -np.inf
        ]

    def running_nodes(self) -> set[int]:
        """Where the running beams stand, all at `depth`; empty when the search is over."""
        return {beam.target for beam in self._running}

    def advance(self) -> list[int]:
        """Go as far as the scored nodes reach; the nodes that must be scored to go on, best first, none at the end."""
        while self._running:
            if len(self._pool) == self._beams and self._running[0].score <= self._pool[-1].score:
                self._running = []
                break
            missing = [beam.target for beam in self._running if beam.target not in self._children]
            if missing:
                return missing
            self._step()
        return []

    def _step(self) -> None:
        found = [
            _Beam(beam.score + logprob, target, (beam.history, logprob))
            for beam in self._running
            for logprob, target in self._children[beam.target]
        ]
        found.sort(key=lambda beam: -beam.score)
        found = found[: 2 * self._beams]
        self._pool += [beam for beam in found[: self._beams] if beam.target < 0]
        self._pool.sort(key=lambda beam: -beam.score)
        del self._pool[self._beams :]
        self._running = [beam for beam in found if beam.target >= 0][: self._beams]
        self.depth += 1

    def result(self) -> Candidates:
        """The pool, best first: fewer than G candidates where the catalogue has fewer titles."""
        item_class = [-1 - beam.target for beam in self._pool]
        return Candidates(
            tokens=[np.asarray(self._trie.title_tokens(title), np.int32) for title in item_class],
            logprobs=[_unroll(beam.history) for beam in self._pool],
            item_class=np.asarray(item_class, np.int32),
            score=np.asarray([beam.score for beam in self._pool], np.float32),
        )


def _unroll(history: History | None) -> np.ndarray:
    logprobs = []
    while history is not None:
        history, logprob = history
        logprobs.append(logprob)
    return np.asarray(logprobs[::-1], np.float32)
