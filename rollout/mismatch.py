"""How far the rollout engine's log-probabilities are from the learner's, for the same weights and tokens."""

import torch


def mismatch_metrics(rollout_logprobs: torch.Tensor, learner_logprobs: torch.Tensor) -> dict[str, float]:
    """Differences over tokens [T] of which both give log-probabilities, before the step changes the weights.

    mismatch/max: largest absolute difference. mismatch/mean: mean absolute difference. mismatch/kl: KL of the rollout
    policy from the learner's by the k3 estimator, mean of exp(d) - d - 1 with d = learner - rollout (Schulman 2020);
    the tokens were drawn from the rollout policy. Raises ValueError for tensors of different shapes or without tokens.
    """
    if rollout_logprobs.shape != learner_logprobs.shape or not rollout_logprobs.numel():
        raise ValueError(
            f"rollout log-probabilities {tuple(rollout_logprobs.shape)} and the learner's "
            f"{tuple(learner_logprobs.shape)} must have the same shape and at least one token"
        )
    difference = learner_logprobs.double() - rollout_logprobs.double()
    return {
        "mismatch/max": float(difference.abs().max()),
        "mismatch/mean": float(difference.abs().mean()),
        "mismatch/kl": float((torch.expm1(difference) - difference).mean()),
    }
