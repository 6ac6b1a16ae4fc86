"""Independent samples without the trie: what the policy says when nothing constrains it."""

from collections.abc import Sequence

import numpy as np
import torch

from rollout.children import Children, drawn_index
from rollout.device_trie import DeviceTrie
from rollout.frontier import Frontier
from rollout.groups import Candidates
from rollout.samples import IndependentSamples, as_candidates

_ROWS_AT_ONCE = 64
"""Rows of the vocabulary's cumulative distribution, in float64, that exist at a time."""


class FreeSampleSearch(IndependentSamples):
    """G texts per group of at most `max_tokens` tokens, drawn independently from the model at a temperature.

    Samples agree as long as they have drawn the same tokens. The trie only says which texts are titles. Driven as
    TrieSearch says.
    """

    def __init__(self, trie: DeviceTrie, seeds: Sequence[int], size: int, temperature: float, max_tokens: int) -> None:
        """seeds: one per group. size: G."""
        super().__init__(trie, seeds, size, temperature)
        self.max_tokens = max_tokens
        self._running = torch.ones_like(self._leader, dtype=torch.bool)
        shape = (*self._leader.shape, max_tokens)
        self._tokens = torch.zeros(shape, dtype=torch.int32, device=trie.device)
        self._logprobs = torch.zeros(shape, device=trie.device)
        self._length = torch.zeros_like(self._leader)

    def frontier(self) -> Frontier:
        """See TrieSearch; there are no nodes, and one way on is counted for each beam."""
        last = self._tokens[..., max(self._step - 1, 0)]
        return self._frontier_of(self._running, torch.ones_like(self._leader), torch.zeros_like(self._leader), last)

    def children(self, frontier: Frontier, rows: slice, logits: torch.Tensor) -> Children:
        """See TrieSearch: column i is the token (as `edge`) that sample i of the group would draw."""
        numbers, pieces = self._numbers(frontier, rows), []
        for some, number in zip(logits.split(_ROWS_AT_ONCE), numbers.split(_ROWS_AT_ONCE), strict=True):
            drawn = drawn_index(some, self.temperature, number)
            logprob = some.float().log_softmax(1).gather(1, drawn)
            pieces.append(Children(logprob, drawn, logprob))
        return Children.cat(pieces)

    def advance(self, frontier: Frontier, children: Children) -> None:
        """See TrieSearch: every running sample takes what it drew at its leader's place."""
        token, logprob = self._drawn(frontier, children)
        self._tokens[..., self._step] = torch.where(self._running, token, 0).to(torch.int32)
        self._logprobs[..., self._step] = torch.where(self._running, logprob, 0.0)
        self._length += self._running
        same = (self._leader[:, :, None] == self._leader[:, None, :]) & (token[:, :, None] == token[:, None, :])
        more = self._step + 1 < self.max_tokens
        self._running = self._running & (token != self.trie.source.eos_token) & more
        self._follow(same & self._running[:, None, :])

    def results(self) -> list[Candidates]:
        """See TrieSearch, but in the order of drawing."""
        self._finite.check()
        tokens, logprobs, length = (values.cpu().numpy() for values in (self._tokens, self._logprobs, self._length))
        classes = [
            [self.trie.source.classify(row[:n].tolist()) for row, n in zip(*group, strict=True)]
            for group in zip(tokens, length, strict=True)
        ]
        return as_candidates(tokens, logprobs, length, np.asarray(classes, np.int32))
