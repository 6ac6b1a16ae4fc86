"""DAPO: token-level ratio, mean over all tokens of the update."""

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


@objective(mean_over="tokens")
def dapo(batch: CompletionBatch, config: LearnerConfig) -> tuple[torch.Tensor, Metrics]:
    """-sum_t(ratio_t * A - beta * KL_t) per completion, over the update's tokens (DAPO, arXiv 2503.14476, eq. 8).

    The published ReRe code divides by the tokens of each micro-batch instead; with one micro-batch that is the same.
    Off-policy what a token gains is weighted by min(old / rollout, importance_cap) of that token (TIS).
    """
    surrogate, clipped = clipped_surrogate(batch.logp - batch.old, batch.advantages[:, None], config)
    if batch.logp_rollout is not None:
        surrogate = surrogate * importance_weight(batch.old - batch.logp_rollout, config)
    kl = kl_penalty(batch)
    metrics = {"kl": batch.token_mean(kl.detach()), "clipped": batch.token_mean(clipped.float())}
    return batch.token_sum(config.beta * kl - surrogate), metrics
