"""Independent samples of constrained titles, where samples that agree so far are computed once."""

from collections.abc import Sequence

import numpy as np
import torch

from rollout.children import Children, draw_children
from rollout.config import LogprobSpace
from rollout.device_trie import DeviceTrie
from rollout.frontier import Frontier
from rollout.groups import Candidates
from rollout.history import Past, Steps
from rollout.noise import seed_tensor, uniform


class SampleSearch:
    """G titles per group, drawn independently from the model renormalised over the allowed tokens at a temperature.

    Samples at the same node of the trie share one beam, that of the first of them. The random numbers are a function
    of (seed, sample, depth), so a group does not depend on the others nor on how it is batched. Driven as TrieSearch
    says.
    """

    def __init__(
        self,
        trie: DeviceTrie,
        seeds: Sequence[int],
        size: int,
        temperature: float,
        space: LogprobSpace = "vocabulary",
    ) -> None:
        """seeds: one per group. size: G. space: of the log-probabilities that are reported."""
        shape, device = (len(seeds), size), trie.device
        self.trie, self.groups, self.beams = trie, len(seeds), size
        self.temperature, self.space = temperature, space
        self._seed = seed_tensor(seeds, device)[:, None]
        self._sample = torch.arange(size, device=device)
        self._node = torch.zeros(shape, dtype=torch.int64, device=device)
        self._leader = torch.zeros_like(self._node)
        self._origin = torch.zeros_like(self._node)
        self._token = torch.zeros(shape, dtype=torch.int32, device=device)
        self._step = 0
        self._past = Past(trie, *shape)
        self._item_class = torch.full_like(self._node, -1)
        self._length = torch.zeros_like(self._node)

    def frontier(self) -> Frontier:
        """See TrieSearch."""
        leads = (self._node >= 0) & (self._leader == self._sample)
        fanout = torch.where(leads, self.trie.fanout(self._node.clamp_min(0)), 0)
        host_fanout, parent = torch.stack([fanout, torch.where(leads, self._origin, -1)]).cpu().numpy()
        slot = np.flatnonzero(host_fanout)
        rows = torch.from_numpy(slot).to(leads.device, non_blocking=True)
        counts, fanouts = np.ones(len(slot), np.int64), host_fanout.ravel()[slot]
        return Frontier(slot, counts, parent, fanouts, self._node.view(-1)[rows], self._token.view(-1)[rows])

    def children(self, frontier: Frontier, rows: slice, logits: torch.Tensor) -> Children:
        """See TrieSearch: column i is what sample i of the group would draw at the node."""
        group = torch.from_numpy(frontier.slot[rows] // self.beams).to(self._seed.device)
        numbers = uniform(self._seed, self._sample, torch.full_like(self._sample, self._step))[group]
        return draw_children(
            self.trie, logits, frontier.node[rows], frontier.fanout[rows], numbers, self.temperature, self.space
        )

    def advance(self, frontier: Frontier, children: Children) -> None:
        """See TrieSearch: every sample takes what it drew at its leader's node."""
        shape, device = self._node.shape, self._node.device
        row = torch.zeros(shape, dtype=torch.int64, device=device)
        slot = torch.from_numpy(frontier.slot).to(device, non_blocking=True)
        row.view(-1)[slot] = torch.arange(len(slot), device=device)
        row = row.gather(1, self._leader)
        running = self._node >= 0
        edge, logprob = (values[row, self._sample] for values in (children.edge, children.logprob))
        step = torch.full((self.groups,), self._step, dtype=torch.int64, device=device)
        sample, score = self._sample.expand(shape), logprob.double()
        self._past.record(step, Steps(score, sample, edge, logprob, score))
        self._step += 1
        target = self.trie.edge_target[edge].long()
        self._item_class = torch.where(running & (target < 0), -1 - target, self._item_class)
        self._length = self._length + running
        self._origin = self._leader
        self._token = self.trie.edge_token[edge]
        self._node = torch.where(running & (target >= 0), target, -1)
        self._leader = (self._node[:, :, None] == self._node[:, None, :]).to(torch.int8).argmax(2)

    def results(self) -> list[Candidates]:
        """See TrieSearch, but in the order of drawing."""
        length, item_class = self._length.cpu().numpy(), self._item_class.cpu().numpy().astype(np.int32)
        sample = np.broadcast_to(np.arange(self.beams), length.shape)
        tokens, logprobs = self._past.trace(sample, length)
        groups = []
        for group, lengths in enumerate(length):
            own = [row[:n] for row, n in zip(logprobs[group], lengths, strict=True)]
            groups.append(
                Candidates(
                    tokens=[row[:n] for row, n in zip(tokens[group], lengths, strict=True)],
                    logprobs=own,
                    item_class=item_class[group],
                    score=np.array([row.sum() for row in own], np.float32),
                )
            )
        return groups
