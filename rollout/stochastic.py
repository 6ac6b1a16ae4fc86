"""Sampling without replacement from the constrained policy: stochastic beam search over the trie."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from rollout.children import NEG_INF, Children, top_children
from rollout.config import LogprobSpace
from rollout.device_trie import DeviceTrie
from rollout.frontier import Frontier
from rollout.groups import Candidates
from rollout.history import Pool, Steps
from rollout.largest import first_largest
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
        self._seed = seed_tensor(seeds, trie.device)
        self._score = self._score.double()
        self._score[:, 0] = gumbel(self._seed, torch.full_like(self._seed, -1))
        self._drawn = self._policy = torch.zeros_like(self._score)
        nothing = self._pool.score.double()
        self._pool = replace(self._pool, score=nothing, drawn=nothing, policy=nothing)

    def children(self, frontier: Frontier, rows: slice, logits: torch.Tensor) -> Children:
        """See TrieSearch: the G + 1 whose log-probability plus noise is largest."""
        group = torch.from_numpy(np.repeat(frontier.slot // self.beams, frontier.count)[rows])
        seed = self._seed[group.to(self._seed.device, non_blocking=True)]

        def perturbed(row: torch.Tensor, edge: torch.Tensor, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            policy = raw.double().log_softmax(1)
            below = raw.double() - raw.amax(1, keepdim=True)  # which no temperature divides beyond what is finite
            drawn = policy if self.temperature == 1 else (below / self.temperature).log_softmax(1)
            return drawn + gumbel(seed[row][:, None], edge), policy

        return top_children(
            self.trie, logits, frontier.node[rows], frontier.fanout[rows], self.beams, self.space, perturbed
        )

    def _best_steps(self, children: Children) -> Steps:
        """The G + 1 largest among the children of all beams and what has ended; smaller ones drop out of both."""
        assert children.key is not None
        assert children.policy is not None
        width = children.key.shape[2]
        perturbed = self._drawn[..., None] + children.key
        score = _conditioned(self._score[..., None], perturbed).flatten(1)
        drawn = perturbed - gumbel(self._seed[:, None, None], children.edge)
        policy = self._policy[..., None] + children.policy
        order = first_largest(score, self.beams)
        score = score.gather(1, order)
        rivals = torch.cat([self._pool.score, score], 1)
        smallest = rivals.topk(min(self.beams, rivals.shape[1]), 1).values[:, -1:]
        self._pool = replace(self._pool, score=torch.where(self._pool.score < smallest, NEG_INF, self._pool.score))
        score = torch.where(score < smallest, NEG_INF, score)
        columns = (children.edge, children.logprob, drawn, policy)
        return Steps(score, order // width, *(values.flatten(1).gather(1, order) for values in columns))

    def _follow(self, alive: torch.Tensor, steps: Steps, target: torch.Tensor) -> None:
        super()._follow(alive, steps, target)
        assert steps.drawn is not None
        assert steps.policy is not None
        self._drawn, self._policy = steps.drawn, steps.policy

    def results(self) -> list[Candidates]:
        """See TrieSearch, but in the order of drawing; the score is the summed log-probability, without the noise."""
        weight = inclusion_weights(self._pool, self.size).cpu().numpy()
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


def inclusion_weights(pool: Pool, size: int) -> torch.Tensor:
    """float64 [P, size]: p / q of the first `size` titles of a pool of size + 1."""
    assert pool.drawn is not None
    assert pool.policy is not None
    kappa, drawn, policy = pool.score[:, size:], pool.drawn[:, :size], pool.policy[:, :size]
    log_inclusion = torch.log(-torch.expm1(-torch.exp(drawn - kappa)))
    return torch.exp(policy - log_inclusion)
