"""What a search has done: the steps of its beams, and the titles that they have finished."""

from dataclasses import dataclass, fields

import numpy as np
import torch

from rollout.chains import Chains
from rollout.children import NEG_INF
from rollout.device_trie import DeviceTrie
from rollout.largest import first_largest


@dataclass(frozen=True)
class Steps:
    """Ways to go on, or to end, of every group: [P, C] each, best first."""

    score: torch.Tensor
    """What they are ordered by; -inf where there is none."""
    parent: torch.Tensor
    """int64: the beam that is extended."""
    edge: torch.Tensor
    """int64: of the trie."""
    logprob: torch.Tensor
    """float32: of the edge's token."""
    drawn: torch.Tensor | None = None
    """float64: log-probability of the whole prefix under what is sampled from, the policy at a temperature."""
    policy: torch.Tensor | None = None
    """float64: log-probability of the whole prefix under the policy, both renormalised over the trie's children."""

    def gather(self, index: torch.Tensor) -> "Steps":
        return Steps(**{name: values.gather(1, index) for name, values in _columns(self).items()})


class Past:
    """Which step every beam took at every depth, so that a title's tokens and log-probabilities can be read back."""

    def __init__(self, trie: DeviceTrie, groups: int, beams: int) -> None:
        shape = (groups, trie.num_depths, beams)
        self._trie = trie
        self._parent = torch.zeros(shape, dtype=torch.int64, device=trie.device)
        self._edge = torch.zeros(shape, dtype=torch.int64, device=trie.device)
        self._logprob = torch.zeros(shape, device=trie.device)
        self._group = torch.arange(groups, device=trie.device)

    def record(self, depth: torch.Tensor, steps: Steps) -> None:
        """Every group took the steps [P, G] at its depth, int64 [P], which is behind all that it has finished."""
        for past, new in ((self._parent, steps.parent), (self._edge, steps.edge), (self._logprob, steps.logprob)):
            past[self._group, depth] = new

    def record_chains(self, depth: torch.Tensor, chains: Chains, logprob: torch.Tensor) -> None:
        """Every beam followed its chain: logprob float32 [P, G, K]. depth: int64 [P], before.

        What is recorded behind a chain's end is read by nobody: beams that go on have chains of equal length, and what
        they do next takes its place.
        """
        _, beams, longest = logprob.shape
        if not longest:
            return
        ahead = torch.arange(longest, device=depth.device)
        # What is not taken may lie behind the longest title; no step but end-of-sequence, kept elsewhere, is its last.
        at = (self._group[:, None], (depth[:, None] + ahead).clamp_max(self._trie.num_depths - 1))
        stays = torch.arange(beams, device=depth.device).expand(len(depth), longest, beams)
        edge = chains.edge[..., :-1].transpose(1, 2)
        for past, new in ((self._parent, stays), (self._edge, edge), (self._logprob, logprob.transpose(1, 2))):
            past[at] = new

    def trace(self, beam: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probabilities [P, K, D] of the first `depth` steps to each `beam`, both [P, K]."""
        parent, depths = self._parent.cpu().numpy(), self._trie.num_depths
        group, beams = np.arange(len(beam))[:, None], np.empty((depths, *beam.shape), np.int64)
        for step in range(depths - 1, -1, -1):
            beams[step] = beam
            beam = np.where(step < depth, parent[group, step, beam], beam)
        there = group[..., None], np.arange(depths), beams.transpose(1, 2, 0)
        tokens = self._trie.edge_token[self._edge].cpu().numpy()[there]
        logprobs = self._logprob.cpu().numpy()[there]
        return tokens, logprobs


@dataclass(frozen=True)
class Pool:
    """The best finished titles of every group, best first: [P, K] each."""

    score: torch.Tensor
    """-inf where there is none."""
    item_class: torch.Tensor
    beam: torch.Tensor
    """int64: the beam, at the depth where the title ended, that ended."""
    depth: torch.Tensor
    """int64: tokens before end-of-sequence."""
    logprob: torch.Tensor
    """float32: of end-of-sequence."""
    drawn: torch.Tensor | None = None
    policy: torch.Tensor | None = None
    """float64: of the title, see Steps."""

    @classmethod
    def empty(cls, groups: int, size: int, device: torch.device) -> "Pool":
        nothing = torch.full((groups, size), NEG_INF, device=device)
        zero = torch.zeros((groups, size), dtype=torch.int64, device=device)
        return cls(nothing, zero - 1, zero, zero, nothing)

    @classmethod
    def of(cls, ended: torch.Tensor, steps: Steps, item_class: torch.Tensor, depth: torch.Tensor) -> "Pool":
        """Of steps [P, C], those that `ended`; item_class, depth: like them."""
        score = torch.where(ended, steps.score, NEG_INF)
        return cls(score, item_class, steps.parent, depth, steps.logprob, steps.drawn, steps.policy)

    def gather(self, index: torch.Tensor) -> "Pool":
        return Pool(**{name: values.gather(1, index) for name, values in _columns(self).items()})

    def best_with(self, others: "Pool") -> "Pool":
        """As many as there were, the best of these and the others; of equals, these first."""
        size = self.score.shape[1]
        more = _columns(others)
        joined = {name: torch.cat([values, more[name]], 1) for name, values in _columns(self).items()}
        order = first_largest(joined["score"], size)
        return Pool(**{name: values.gather(1, order) for name, values in joined.items()})


def _columns(record: Steps | Pool) -> dict[str, torch.Tensor]:
    """Those that it has, by name."""
    columns = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: values for name, values in columns.items() if values is not None}
