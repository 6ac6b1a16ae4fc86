"""REINFORCE with a leave-one-out baseline."""

import torch

from learner.advantages import leave_one_out_advantages
from learner.config import LearnerConfig
from learner.objectives.base import CompletionBatch, Metrics, importance_weight, kl_penalty, objective


@objective(mean_over="completions", advantages=lambda rewards, _: leave_one_out_advantages(rewards))
def reinforce(batch: CompletionBatch, config: LearnerConfig) -> tuple[torch.Tensor, Metrics]:
    """-(A * log pi(completion) - beta * sum_t KL_t) per completion (RLOO, arXiv 2402.14740).

    The advantage is not divided by the standard deviation and nothing is clipped. Off-policy the gain is weighted by
    min(pi / behaviour, importance_cap) of the whole completion, without gradient. The behaviour is the policy of the
    rollout where the batch has it, else the old one, from which later updates of a batch have moved away.
    """
    weighted = batch.token_sum(batch.logp) * batch.advantages
    behaviour = batch.logp_rollout if batch.logp_rollout is not None else batch.logp_old
    if behaviour is not None:
        weighted = weighted * importance_weight(batch.token_sum(batch.logp - behaviour), config)
    kl = kl_penalty(batch)
    return batch.token_sum(config.beta * kl) - weighted, {"kl": batch.token_mean(kl.detach())}
