"""Sampling without replacement from the constrained policy: stochastic beam search over the trie."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from rollout.beams import NO_SCORE, Pool, compete
from rollout.children import NEG_INF, Children, top_children
from rollout.config import LogprobSpace
from rollout.device_trie import DeviceTrie
from rollout.finite import check_finite
from rollout.frontier import Frontier
from rollout.groups import Candidates
from rollout.noise import gumbel, seed_tensor
from rollout.search import BeamSearch


class StochasticBeamSearch(BeamSearch):
    """Gumbel top-k over titles (Kool, van Hoof and Welling 2019): G distinct titles and their inclusion weights.

    The policy is the model's, renormalised over the allowed tokens at every node, and titles are drawn from it at a
    temperature. Every title has the log-probability of its draw plus a Gumbel variable, and the G largest are an
    ordered sample without replacement; they are found top down, since the largest below a node is known from the node
    alone. The search is one wider than G: with kappa the next largest value, a title that is drawn with probability d
    is included with probability q = P(Gumbel(log d) > kappa), and sum(p / q * f(title)) over the sample, with p the
    policy's own probability, is an unbiased estimate of the mean of f under the policy, whatever the temperature.

    The noise is a function of (seed, edge), so a group does not depend on the others nor on how it is batched.
    """

    _carried = 2
    _dtype = np.float64
    """Of every beam the log-probabilities of its prefix: under what is drawn from, and under the policy."""

    def __init__(
        self,
        trie: DeviceTrie,
        seeds: Sequence[int],
        size: int,
        temperature: float,
        space: LogprobSpace = "vocabulary",
    ) -> None:
        """seeds: one per group. size: G. space: of the log-probabilities that are reported."""
        super().__init__(trie, len(seeds), size + 1, space, "token_by_token")
        self.size, self.temperature, self._free_chains = size, temperature, False
        self._seed = seed_tensor(seeds, torch.device("cpu"))
        self._state.score[:, 0] = gumbel(self._seed, torch.full_like(self._seed, -1)).numpy()

    def children(self, frontier: Frontier, rows: slice, logits: torch.Tensor) -> Children:
        """See TrieSearch: the G + 1 whose log-probability plus noise is largest."""
        seed = self._seeds_of(frontier)[rows].to(logits.device, non_blocking=True)

        def perturbed(row: torch.Tensor, edge: torch.Tensor, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            policy = raw.double().log_softmax(1)
            below = raw.double() - raw.amax(1, keepdim=True)  # which no temperature divides beyond what is finite
            drawn = policy if self.temperature == 1 else (below / self.temperature).log_softmax(1)
            return drawn + gumbel(seed[row][:, None], edge), policy

        return top_children(
            self.trie, logits, frontier.node[rows], frontier.fanout[rows], self.beams, self.space, perturbed
        )

    def advance(self, frontier: Frontier, children: Children) -> None:
        """See TrieSearch: the G + 1 largest among the children of all beams and what has ended go on."""
        found = children.to_host()
        assert found.key is not None
        assert found.policy is not None
        check_finite((found.logprob + found.key).numpy())
        of_beam = np.unravel_index(frontier.slot, self._state.score.shape)
        largest, parent = (torch.from_numpy(v[of_beam]) for v in (self._state.score, self._state.carried))
        perturbed = parent[:, :1] + found.key
        drawn = perturbed - gumbel(self._seeds_of(frontier)[:, None], found.edge)
        carried = torch.stack([drawn, parent[:, 1:] + found.policy], 2).numpy()
        score = _conditioned(largest[:, None], perturbed).numpy()
        drop_beyond(self.beams, frontier.slot, score, self._pool.score)
        edge, logprob = found.edge.numpy(), found.logprob.numpy()
        compete(self._arrays, self._state, self._pool, self.beams, score, edge, logprob, carried)

    def _seeds_of(self, frontier: Frontier) -> torch.Tensor:
        """int64 [T], on the host; every beam of the frontier stands at one node."""
        return self._seed[torch.from_numpy(frontier.slot // self.beams)]

    def results(self) -> list[Candidates]:
        """See TrieSearch, but in the order of drawing; the score is the summed log-probability, without the noise."""
        weight = inclusion_weights(self._pool, self.size)
        groups = []
        for group, found in enumerate(super().results()):
            drawn = found.take(np.arange(min(self.size, len(found.score))))
            groups.append(
                replace(
                    drawn,
                    score=np.array([row.sum() for row in drawn.logprobs], np.float32),
                    inclusion_weight=weight[group, : len(drawn.score)].astype(np.float32),
                )
            )
        return groups


def _conditioned(largest: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Gumbel variables [..., W], the first the largest, given that the largest is `largest` [..., 1].

    Kool et al. 2019, appendix B.3, in the form that does not lose precision.
    """
    ahead = largest - values + torch.log(-torch.expm1(values - values[..., :1]))
    shifted = largest - ahead.clamp_min(0) - torch.log1p(torch.exp(-ahead.abs()))
    return torch.where(values > NEG_INF, shifted, NEG_INF)


def drop_beyond(keep: int, slot: np.ndarray, score: np.ndarray, finished: np.ndarray) -> None:
    """What is below the `keep` largest of a group's candidates and finished titles is set to -inf, in both.

    slot: int64 [R], group * G + beam. score: float64 [R, W], of the beams' children. finished: float64 [P, G].
    """
    groups, beams = finished.shape
    candidates = np.full((groups * beams, score.shape[1]), NO_SCORE)
    candidates[slot] = score
    rivals = np.concatenate([finished, candidates.reshape(groups, -1)], 1)
    smallest = np.partition(rivals, -keep, 1)[:, -keep]
    finished[finished < smallest[:, None]] = NO_SCORE
    score[score < smallest[slot // beams, None]] = NO_SCORE


def inclusion_weights(pool: Pool, size: int) -> np.ndarray:
    """float64 [P, size]: p / q of the first `size` titles of a pool of size + 1."""
    kappa, drawn, policy = pool.score[:, size:], pool.carried[:, :size, 0], pool.carried[:, :size, 1]
    with np.errstate(divide="ignore", over="ignore"):  # of what is not there
        log_inclusion = np.log(-np.expm1(-np.exp(drawn - kappa)))
    return np.exp(policy - log_inclusion)
