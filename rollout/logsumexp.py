"""The normaliser of log-probabilities, as each device computes it best; rollouts and learner share it."""

import torch

_CACHED_ELEMENTS, _ON_CUDA = 1 << 19, 1 << 27
"""Logits of some rows that are normalised at once."""
_CANCELS = -32.0
"""Log-probability of the first token below which a normaliser is not read off it: too many digits cancel."""


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """float32 [R] of logits [R, V] in any precision; not finite for a row that holds NaN, +inf, or nothing but -inf.

    Some rows at a time, so that no copy of [R, V] is made; on the CPU by torch's log-softmax, which is one pass over
    memory where its logsumexp is several.
    """
    if logits.device.type != "cpu":
        rows = max(1, _ON_CUDA // logits.shape[1])
        return torch.cat([chunk.float().logsumexp(1) for chunk in logits.split(rows)])
    rows = max(1, _CACHED_ELEMENTS // logits.shape[1])
    first = torch.cat([chunk.float().log_softmax(1)[:, 0].clone() for chunk in logits.split(rows)])
    found, unlikely = logits[:, 0].float() - first, first < _CANCELS
    if bool(unlikely.any()):
        found[unlikely] = torch.cat([chunk.float().logsumexp(1) for chunk in logits[unlikely].split(rows)])
    return found
