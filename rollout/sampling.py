"""Independent samples of constrained titles, where samples that agree so far are computed once."""

from collections.abc import Sequence

import numpy as np
import torch

from rollout.children import Children, draw_children
from rollout.config import LogprobSpace
from rollout.device_trie import DeviceTrie
from rollout.frontier import Frontier
from rollout.groups import Candidates
from rollout.samples import IndependentSamples, as_candidates


class SampleSearch(IndependentSamples):
    """G titles per group, drawn independently from the model renormalised over the allowed tokens at a temperature.

    Samples agree as long as they stand at the same node of the trie. Driven as TrieSearch says.
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
        super().__init__(trie, seeds, size, temperature)
        self.space = space
        self._node = torch.zeros_like(self._leader)
        self._token = torch.zeros_like(self._leader, dtype=torch.int32)
        self._taken: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Edges and log-probabilities [P, G] of every step; of a sample that has ended, whatever they are."""
        self._item_class = torch.full_like(self._node, -1)
        self._length = torch.zeros_like(self._node)

    def frontier(self) -> Frontier:
        """See TrieSearch."""
        fanout = self.trie.fanout(self._node.clamp_min(0))
        return self._frontier_of(self._node >= 0, fanout, self._node, self._token)

    def children(self, frontier: Frontier, rows: slice, logits: torch.Tensor) -> Children:
        """See TrieSearch: column i is what sample i of the group would draw at the node."""
        node, fanout, numbers = frontier.node[rows], frontier.fanout[rows], self._numbers(frontier, rows)
        return draw_children(self.trie, logits, node, fanout, numbers, self.temperature, self.space)

    def advance(self, frontier: Frontier, children: Children) -> None:
        """See TrieSearch: every sample takes what it drew at its leader's node."""
        running = self._node >= 0
        edge, logprob = self._drawn(frontier, children)
        self._taken.append((edge, logprob))
        target = self.trie.edge_target[edge].long()
        self._item_class = torch.where(running & (target < 0), -1 - target, self._item_class)
        self._length = self._length + running
        self._token = self.trie.edge_token[edge]
        self._node = torch.where(running & (target >= 0), target, -1)
        self._follow(self._node[:, :, None] == self._node[:, None, :])

    def results(self) -> list[Candidates]:
        """See TrieSearch, but in the order of drawing."""
        self._finite.check()
        length, item_class = self._length.cpu().numpy(), self._item_class.cpu().numpy().astype(np.int32)
        edges, logprobs = (torch.stack(steps, 2).cpu().numpy() for steps in zip(*self._taken, strict=True))
        return as_candidates(self.trie.source.edge_token[edges], logprobs, length, item_class)
