"""The normaliser of log-probabilities, as each device computes it best; rollouts and learner share it."""

import torch

_CACHED_ELEMENTS = 1 << 19


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """float32 [R] of finite logits [R, V] in any precision.

    By torch's log-softmax, which is one pass over memory where its logsumexp is several; on the CPU a few rows at a
    time, so that no copy of [R, V] is made.
    """
    if logits.device.type != "cpu":
        return logits[:, 0].float() - logits.log_softmax(1, dtype=torch.float32)[:, 0]
    rows = max(1, _CACHED_ELEMENTS // logits.shape[1])
    return torch.cat(
        [chunk[:, 0] - chunk.log_softmax(1)[:, 0] for chunk in map(torch.Tensor.float, logits.split(rows))]
    )
