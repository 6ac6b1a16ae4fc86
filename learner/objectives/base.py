"""What objectives share: the arrays they see, how their sum becomes a mean, and the terms they are made of."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch

from catalog.own_code import traceback_below
from learner.advantages import Advantages, group_advantages
from learner.config import LearnerConfig

Normaliser = Literal["completions", "tokens"]
Metrics = dict[str, torch.Tensor]
LEARNERS_METRICS = frozenset(
    {
        "candidates",
        "completion_tokens",
        "frac_uninformative",
        "grad_norm",
        "groups",
        "logprob",
        "loss",
        "lr",
        "micro_batches",
        "mismatch",
        "packed_tokens",
        "tokens_per_second",
    }
)
"""Names of what learner.update measures itself, beside "seconds/..." for times; no objective may return them."""
OTHERS_METRICS = frozenset(
    {"frac_reward_zero_std", "groups_with_hit", "invalid_candidates", "phase", "reward", "reward_std", "step"}
)
"""Names of what stands beside them in a logged line."""
METRICS_OF_STAGES = ("hits/", "rewards/", "rollout/", "seconds/", "timing_s/")
"""Beginnings of names of what stages measure."""


def _is_taken(name: str) -> bool:
    """Whether a metric of that name would stand in for another's in a logged line."""
    return name in LEARNERS_METRICS | OTHERS_METRICS or name.startswith(METRICS_OF_STAGES)


@dataclass(frozen=True)
class CompletionBatch:
    """The completions of one micro-batch: C rows of at most T tokens, end-of-sequence included."""

    logp: torch.Tensor
    """float32 [C, T], under the policy that is being trained; carries the gradient. 0 where mask is False."""
    mask: torch.Tensor
    """bool [C, T]"""
    advantages: torch.Tensor
    """float32 [C]"""
    logp_old: torch.Tensor | None = None
    """float32 [C, T], under the policy before this batch's first update. None: this is the first update."""
    logp_ref: torch.Tensor | None = None
    """float32 [C, T], under the reference model. None: beta is 0."""
    logp_rollout: torch.Tensor | None = None
    """float32 [C, T], under the policy that generated the candidates. None: it is taken for the old one."""

    @property
    def old(self) -> torch.Tensor:
        """[C, T]: logp_old, or the policy itself without its gradient."""
        return self.logp.detach() if self.logp_old is None else self.logp_old

    def token_mean(self, values: torch.Tensor) -> torch.Tensor:
        """[C, T] -> [C], the mean over each completion's tokens."""
        return self.token_sum(values) / self.mask.sum(-1).clamp(min=1)

    def token_sum(self, values: torch.Tensor) -> torch.Tensor:
        """[C, T] -> [C], the sum over each completion's tokens."""
        return values.masked_fill(~self.mask, 0.0).sum(-1)


Contributions = Callable[[CompletionBatch, LearnerConfig], tuple[torch.Tensor, Metrics]]
"""(batch, config) -> (loss contributions [C], metrics [C] each)."""
AdvantagesOf = Callable[[Sequence[np.ndarray], bool], Advantages]
"""(rewards of each group, normalize_std) -> advantages of each group. The rewards are copies: they may be changed."""


class ObjectiveError(ValueError):
    """A name that leads to no objective, or an objective that does not do what one must."""


@dataclass(frozen=True)
class Objective:
    """A policy-gradient objective.

    >>> advantages = objective.advantages(rewards, config.normalize_std)
    >>> contributions, metrics = objective(batch, config)           # [C], and [C] for each metric
    >>> loss = contributions.sum() / objective.count(candidates_of_the_whole_update)

    The count is that of the whole update - every group of every micro-batch of every rank, groups that were not fed
    included - so that the losses of the micro-batches add up to the loss of the unsplit batch, however it is split.
    """

    contributions: Contributions
    normaliser: Normaliser
    advantages_of: AdvantagesOf

    def advantages(self, rewards: Sequence[np.ndarray], normalize_std: bool) -> Advantages:
        """float32 [G_i] of each group, out of its rewards [G_i].

        Raises ObjectiveError with the traceback of what the function raised, or where it returns anything but one
        finite number per candidate.
        """
        try:
            returned = self.advantages_of([np.array(group) for group in rewards], normalize_std)
            with np.errstate(over="ignore"):  # what float32 cannot hold is not finite
                advantages = [np.asarray(group, np.float32) for group in returned]
        except (Exception, SystemExit) as error:
            raise ObjectiveError(f"the advantages of {self} raised:\n{traceback_below(error, __file__)}") from error
        if len(advantages) != len(rewards):
            raise ObjectiveError(
                f"the advantages of {self} are of {len(advantages)} groups where the rewards are of {len(rewards)}: "
                "return one array per group"
            )
        for group, (of_group, given) in enumerate(zip(advantages, rewards, strict=True)):
            if of_group.shape != (len(given),) or not np.isfinite(of_group).all():
                raise ObjectiveError(
                    f"the advantages of {self} must be one finite number per candidate; of group {group} with the "
                    f"rewards {np.asarray(given).tolist()} they are {of_group.tolist()}"
                )
        return advantages

    def __call__(self, batch: CompletionBatch, config: LearnerConfig) -> tuple[torch.Tensor, Metrics]:
        """Loss contributions [C] to be summed and divided by `count`, and metrics [C] to be averaged.

        Raises ObjectiveError with the traceback of what the function raised, or where it returns anything else.
        """
        try:
            returned = self.contributions(batch, config)
        except (Exception, SystemExit) as error:
            raise ObjectiveError(f"objective {self} raised:\n{traceback_below(error, __file__)}") from error
        self._check(returned, len(batch.logp))
        return returned

    def __str__(self) -> str:
        return f"{self.contributions.__module__}:{getattr(self.contributions, '__name__', self.contributions)}"

    def _check(self, returned: object, completions: int) -> None:
        if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], dict):
            raise ObjectiveError(
                f"objective {self} returned {type(returned).__name__}; it must return (contributions, metrics): a "
                "tensor [C] and a dict of tensors [C]"
            )
        contributions, metrics = returned
        taken = sorted(name for name in metrics if _is_taken(str(name)))
        if taken:
            raise ObjectiveError(
                f"objective {self} returned the metrics {taken}, which a run logs itself under these names: "
                "give yours other names"
            )
        for what, value in (("its contributions", contributions), *metrics.items()):
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            if shape != (completions,):
                raise ObjectiveError(
                    f"objective {self}: {what} must be one number per completion, a tensor of shape ({completions},); "
                    f"got {shape}. The learner itself sums contributions and divides them"
                )

    def check_names(self, returned: Collection[frozenset[str]]) -> None:
        """Raise ObjectiveError where calls have returned metrics of different names; returned: those of each call."""
        if len(set(returned)) > 1:
            some = sorted(map(str, frozenset.union(*returned) - frozenset.intersection(*returned)))
            raise ObjectiveError(
                f"objective {self} returned the metrics {some} in some calls and not in others: return the same at "
                "every call, since they are averaged over all completions; where there is nothing, 0"
            )

    def count(self, candidates: Sequence[Sequence[Sequence[int]]]) -> int:
        """What the update's contributions are divided by. candidates[group][rank] are the tokens of a candidate."""
        if self.normaliser == "completions":
            return sum(len(group) for group in candidates)
        return sum(len(tokens) for group in candidates for tokens in group)


def gets_rollout(config: LearnerConfig, staleness: int) -> bool:
    """Whether the batches of a run with that train.staleness have logp_rollout."""
    return staleness > 0 or config.importance_sampling == "always"


def check_objective(objective: Objective, config: LearnerConfig, staleness: int) -> None:
    """Call an objective on small batches with what a run with that train.staleness will give it.

    Its advantages are called on groups of different sizes, one with equal rewards. Raises ObjectiveError where
    something fails, or its loss would train nothing.
    """
    rewards = [[1.0, 0.0, -0.5, 0.0], [0.0, 0.0, 0.0], [0.25, 1.0]]
    objective.advantages([np.array(group, np.float32) for group in rewards], config.normalize_std)
    logp = -torch.linspace(0.1, 2.0, 12).view(4, 3)
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [True, True, True]])
    logp = logp.masked_fill(~mask, 0.0).requires_grad_()
    reference = (logp.detach() * 1.1) if config.beta else None
    rollout = (logp.detach() * 0.9) if gets_rollout(config, staleness) else None
    first = CompletionBatch(logp, mask, torch.tensor([1.0, -0.5, 0.0, -0.5]), logp_ref=reference, logp_rollout=rollout)
    later = [replace(first, logp_old=logp.detach() * 1.05)] if config.updates_per_step > 1 else []
    objective.check_names([_try(objective, config, batch) for batch in (first, *later)])


def _try(objective: Objective, config: LearnerConfig, batch: CompletionBatch) -> frozenset[str]:
    """Names of the metrics that a call returns. Raises ObjectiveError where its loss would train nothing."""
    contributions, metrics = objective(batch, config)
    if not contributions.requires_grad:
        raise ObjectiveError(
            f"objective {objective}: its contributions do not depend on batch.logp: nothing can learn"
        )
    (gradient,) = torch.autograd.grad(contributions.sum(), batch.logp)
    if not (contributions.isfinite().all() and gradient.isfinite().all()):
        raise ObjectiveError(
            f"objective {objective}: of a small batch with finite log-probabilities its contributions or their "
            f"gradient are not finite: {contributions.tolist()}"
        )
    return frozenset(metrics)


def objective(
    *, mean_over: Normaliser, advantages: AdvantagesOf = group_advantages
) -> Callable[[Contributions], Objective]:
    """Make a function of the kind Contributions an Objective. Raises ObjectiveError for another mean."""
    if mean_over not in get_args(Normaliser):
        raise ObjectiveError(
            f"@objective(mean_over={mean_over!r}): the mean runs over {' or '.join(get_args(Normaliser))}"
        )

    def declare(contributions: Contributions) -> Objective:
        return Objective(contributions, mean_over, advantages)

    return declare


def kl_penalty(batch: CompletionBatch) -> torch.Tensor:
    """[C, T]: the k3 estimator exp(ref - lp) - (ref - lp) - 1 (Schulman 2020), never negative. 0 without reference."""
    if batch.logp_ref is None:
        return torch.zeros_like(batch.logp)
    difference = batch.logp_ref - batch.logp
    return torch.expm1(difference) - difference


def clipped_surrogate(
    log_ratio: torch.Tensor, advantages: torch.Tensor, config: LearnerConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's min(ratio * A, clip(ratio) * A), and where the clip binds; shapes broadcast.

    The bounds are 1 - clip_low and 1 + clip_high (DAPO, arXiv 2503.14476, eq. 8); a bound of None does not clip.
    """
    ratio = log_ratio.exp()
    lower = None if config.clip_low is None else 1.0 - config.clip_low
    upper = None if config.clip_high is None else 1.0 + config.clip_high
    surrogate = ratio * advantages
    if lower is None and upper is None:
        return surrogate, torch.zeros_like(surrogate, dtype=torch.bool)
    clipped = ratio.clamp(lower, upper) * advantages
    return torch.minimum(surrogate, clipped), clipped.detach() < surrogate.detach()


def importance_weight(log_weight: torch.Tensor, config: LearnerConfig) -> torch.Tensor:
    """min(exp(log_weight), importance_cap) without gradient: truncated importance sampling (Ionides 2008).

    log_weight, of a token or of a completion: log pi_old - log pi_rollout beside a ratio pi / pi_old, and without one
    log pi - log pi_rollout, or log pi - log pi_old where the rollout's policy is the old one.
    """
    weight = log_weight.detach().exp()
    return weight if config.importance_cap is None else weight.clamp(max=config.importance_cap)
