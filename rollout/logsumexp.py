"""The normaliser of log-probabilities, as each device computes it best; rollouts and learner share it."""

import torch

_CACHED_ELEMENTS, _ON_CUDA = 1 << 19, 1 << 27
"""Logits of some rows that are normalised at once."""


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """float32 [R] of finite logits [R, V] in any precision.

    Some rows at a time, so that no copy of [R, V] is made; on the CPU by torch's log-softmax, which is one pass over
    memory where its logsumexp is several.
    """
    if logits.device.type != "cpu":
        rows = max(1, _ON_CUDA // logits.shape[1])
        return torch.cat([chunk.float().logsumexp(1) for chunk in logits.split(rows)])
    rows = max(1, _CACHED_ELEMENTS // logits.shape[1])
    return torch.cat(
        [chunk[:, 0] - chunk.log_softmax(1)[:, 0] for chunk in map(torch.Tensor.float, logits.split(rows))]
    )
