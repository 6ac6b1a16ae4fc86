"""Independent samples without the trie: what the policy says when nothing constrains it."""

from collections.abc import Sequence

import numpy as np
import torch

from rollout.children import Children, drawn_index
from rollout.device_trie import DeviceTrie
from rollout.frontier import Frontier
from rollout.groups import Candidates
from rollout.noise import seed_tensor, uniform

_ROWS_AT_ONCE = 64
"""Rows of the vocabulary's cumulative distribution, in float64, that exist at a time."""


class FreeSampleSearch:
    """G texts per group of at most `max_tokens` tokens, drawn independently from the model at a temperature.

    Samples that agree so far share one beam, that of the first of them. The random numbers are a function of (seed,
    sample, depth), so a group does not depend on the others nor on how it is batched. The trie only says which texts
    are titles. Driven as TrieSearch says.
    """

    def __init__(self, trie: DeviceTrie, seeds: Sequence[int], size: int, temperature: float, max_tokens: int) -> None:
        """seeds: one per group. size: G."""
        shape, device = (len(seeds), size), trie.device
        self.trie, self.groups, self.beams = trie, len(seeds), size
        self.temperature, self.max_tokens = temperature, max_tokens
        self._seed = seed_tensor(seeds, device)[:, None]
        self._sample = torch.arange(size, device=device)
        self._running = torch.ones(shape, dtype=torch.bool, device=device)
        self._leader = torch.zeros(shape, dtype=torch.int64, device=device)
        self._origin = torch.zeros_like(self._leader)
        self._tokens = torch.zeros((*shape, max_tokens), dtype=torch.int32, device=device)
        self._logprobs = torch.zeros((*shape, max_tokens), device=device)
        self._length = torch.zeros_like(self._leader)
        self._step = 0

    def frontier(self) -> Frontier:
        """See TrieSearch."""
        leads = self._running & (self._leader == self._sample)
        wanted, parent = torch.stack([leads.long(), torch.where(leads, self._origin, -1)]).cpu().numpy()
        slot = np.flatnonzero(wanted)
        rows = torch.from_numpy(slot).to(leads.device, non_blocking=True)
        ones = np.ones(len(slot), np.int64)
        last = self._tokens[..., max(self._step - 1, 0)].view(-1)[rows]
        return Frontier(slot, ones, parent, ones, torch.zeros_like(rows), last)

    def children(self, frontier: Frontier, rows: slice, logits: torch.Tensor) -> Children:
        """See TrieSearch: column i is the token (as `edge`) that sample i of the group would draw."""
        group = torch.from_numpy(frontier.slot[rows] // self.beams).to(self._seed.device)
        numbers = uniform(self._seed, self._sample, torch.full_like(self._sample, self._step))[group]
        pieces = []
        for some, number in zip(logits.split(_ROWS_AT_ONCE), numbers.split(_ROWS_AT_ONCE), strict=True):
            drawn = drawn_index(some, self.temperature, number)
            logprob = some.float().log_softmax(1).gather(1, drawn)
            pieces.append(Children(logprob, drawn, logprob))
        return Children.cat(pieces)

    def advance(self, frontier: Frontier, children: Children) -> None:
        """See TrieSearch: every running sample takes what it drew at its leader's place."""
        row = torch.zeros_like(self._leader)
        slot = torch.from_numpy(frontier.slot).to(row.device, non_blocking=True)
        row.view(-1)[slot] = torch.arange(len(slot), device=row.device)
        row = row.gather(1, self._leader)
        token, logprob = children.edge[row, self._sample], children.logprob[row, self._sample]
        self._tokens[..., self._step] = torch.where(self._running, token, 0).to(torch.int32)
        self._logprobs[..., self._step] = torch.where(self._running, logprob, 0.0)
        self._length += self._running
        self._step += 1
        self._running = self._running & (token != self.trie.source.eos_token) & (self._step < self.max_tokens)
        self._origin = self._leader
        same = (self._leader[:, :, None] == self._leader[:, None, :]) & (token[:, :, None] == token[:, None, :])
        self._leader = (same & self._running[:, None, :]).to(torch.int8).argmax(2)

    def results(self) -> list[Candidates]:
        """See TrieSearch, but in the order of drawing."""
        tokens, logprobs, length = (values.cpu().numpy() for values in (self._tokens, self._logprobs, self._length))
        groups = []
        for group, lengths in enumerate(length):
            own_tokens = [row[:n] for row, n in zip(tokens[group], lengths, strict=True)]
            own = [row[:n] for row, n in zip(logprobs[group], lengths, strict=True)]
            classes = [self.trie.source.classify(row.tolist()) for row in own_tokens]
            score = np.array([row.sum() for row in own], np.float32)
            groups.append(Candidates(own_tokens, own, np.asarray(classes, np.int32), score))
        return groups
