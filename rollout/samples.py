"""What independent samples share, whether the trie constrains them or not: beams, random numbers, results."""

from collections.abc import Sequence

import numpy as np
import torch

from rollout.children import Children
from rollout.device_trie import DeviceTrie
from rollout.finite import FiniteCheck
from rollout.frontier import Frontier
from rollout.groups import Candidates
from rollout.noise import seed_tensor, uniform


class IndependentSamples:
    """G samples of every group; those that agree so far share one beam, that of the first of them, their leader.

    The random numbers are a function of (seed, sample, depth), so a group does not depend on the others nor on how it
    is batched. A subclass says where the samples stand.
    """

    def __init__(self, trie: DeviceTrie, seeds: Sequence[int], size: int, temperature: float) -> None:
        """seeds: one per group. size: G."""
        self.trie, self.groups, self.beams, self.temperature = trie, len(seeds), size, temperature
        self._seed = seed_tensor(seeds, trie.device)[:, None]
        self._sample = torch.arange(size, device=trie.device)
        self._leader = torch.zeros((len(seeds), size), dtype=torch.int64, device=trie.device)
        self._origin = torch.zeros_like(self._leader)
        self._step = 0
        self._finite = FiniteCheck(trie.device)

    def _frontier_of(
        self, running: torch.Tensor, fanout: torch.Tensor, node: torch.Tensor, token: torch.Tensor
    ) -> Frontier:
        """The leaders of the running samples; all arguments [P, G], as the columns of Frontier."""
        leads = running & (self._leader == self._sample)
        columns = [torch.where(leads, fanout, 0), torch.where(leads, self._origin, -1)]
        host_fanout, parent = torch.stack(columns).cpu().numpy()
        slot = np.flatnonzero(host_fanout)
        rows = torch.from_numpy(slot).to(leads.device, non_blocking=True)
        counts, fanouts = np.ones(len(slot), np.int64), host_fanout.ravel()[slot]
        return Frontier(slot, counts, parent, fanouts, node.view(-1)[rows], token.view(-1)[rows])

    def _numbers(self, frontier: Frontier, rows: slice) -> torch.Tensor:
        """float64 [r, G] in (0, 1): of some rows of the frontier, one for each sample of the group."""
        group = torch.from_numpy(frontier.slot[rows] // self.beams).to(self._seed.device, non_blocking=True)
        return uniform(self._seed, self._sample, torch.full_like(self._sample, self._step))[group]

    def _drawn(self, frontier: Frontier, children: Children) -> tuple[torch.Tensor, torch.Tensor]:
        """Edges and log-probabilities [P, G] that the samples drew where their leaders stand.

        Column i of the children is what sample i of the group draws. Samples that do not run get those of another.
        """
        self._finite.note(children.logprob)
        row = torch.zeros_like(self._leader)
        slot = torch.from_numpy(frontier.slot).to(row.device, non_blocking=True)
        row.view(-1)[slot] = torch.arange(len(slot), device=row.device)
        row = row.gather(1, self._leader)
        return children.edge[row, self._sample], children.logprob[row, self._sample]

    def _follow(self, same: torch.Tensor) -> None:
        """One step further; same: bool [P, G, G], which samples agree, of running ones each with itself."""
        self._step += 1
        self._origin = self._leader
        self._leader = same.to(torch.int8).argmax(2)


def as_candidates(
    tokens: np.ndarray, logprobs: np.ndarray, length: np.ndarray, item_class: np.ndarray
) -> list[Candidates]:
    """Groups of samples in the order of drawing.

    tokens: int32 [P, G, D]. logprobs: float32 [P, G, D]. length: int [P, G]. item_class: int32 [P, G].
    """
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
