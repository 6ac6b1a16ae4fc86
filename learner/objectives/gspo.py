"""GSPO: one ratio per completion, the geometric mean of its tokens' ratios."""

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
def gspo(batch: CompletionBatch, config: LearnerConfig) -> tuple[torch.Tensor, Metrics]:
    """-(exp(mean_t log ratio_t) * A - beta * mean_t KL_t) per completion (GSPO, arXiv 2507.18071, eq. 5 and 7).

    Off-policy the gain is weighted by min(old / rollout, importance_cap), of the tokens' geometric mean (TIS).
    """
    surrogate, clipped = clipped_surrogate(batch.token_mean(batch.logp - batch.old), batch.advantages, config)
    if batch.logp_rollout is not None:
        surrogate = surrogate * importance_weight(batch.token_mean(batch.old - batch.logp_rollout), config)
    kl = batch.token_mean(kl_penalty(batch))
    return config.beta * kl - surrogate, {"kl": kl.detach(), "clipped": clipped.float()}
