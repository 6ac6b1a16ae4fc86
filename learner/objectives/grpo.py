"""GRPO: token-level ratio, mean over a completion's tokens, then over completions."""

import torch

from learner.config import LearnerConfig
from learner.objectives.base import (
    CompletionBatch,
    Metrics,
    clipped_surrogate,
    importance_weight,
    kl_penalty,
    objective,
)


@objective(mean_over="completions")
def grpo(batch: CompletionBatch, config: LearnerConfig) -> tuple[torch.Tensor, Metrics]:
    """-mean_t(ratio_t * A - beta * KL_t) per completion (DeepSeekMath, arXiv 2402.03300, eq. 3).

    Off-policy what a token gains is weighted by min(old / rollout, importance_cap) of that token (TIS).
    """
    surrogate, clipped = clipped_surrogate(batch.logp - batch.old, batch.advantages[:, None], config)
    if batch.logp_rollout is not None:
        surrogate = surrogate * importance_weight(batch.old - batch.logp_rollout, config)
    kl = kl_penalty(batch)
    metrics = {"kl": batch.token_mean(kl.detach()), "clipped": batch.token_mean(clipped.float())}
    return batch.token_mean(config.beta * kl - surrogate), metrics
