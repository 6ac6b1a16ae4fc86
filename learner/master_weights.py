"""The step of DeepSpeed's float32 copies of bfloat16 weights, on lists of tensors.

DeepSpeed's own step under stage 0 goes tensor by tensor and asks the device about each: 5,448 operations and 275 waits
for SmolLM2-135M, 68 ms on an H200 where plain PyTorch takes 12. Here it is 15 operations, and it waits once.
"""

from typing import Any

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def step_master_weights(optimizer: Any) -> bool:
    """In place of `optimizer.step`, a FP16_UnfusedOptimizer's; returns whether a gradient was not finite.

    Then nothing changes, the gradients are dropped, and the norm is infinity.
    """
    masters = [master for group in optimizer.fp32_groups for master in group]
    weights = [weight for group in optimizer.fp16_groups for weight in group]
    for master, gradient in zip(masters, _in_float32(weights), strict=True):
        master.grad = gradient
    norm = get_total_norm([master.grad for master in masters])
    optimizer._global_grad_norm = float(norm)
    if not optimizer._global_grad_norm < float("inf"):
        return optimizer._skip_invalid_grad_norm()
    if optimizer.clip_grad > 0:
        clip_grads_with_norm_(masters, optimizer.clip_grad, norm)
    optimizer.optimizer.step()
    for master in masters:
        master.grad = None
    with torch.no_grad():
        torch._foreach_copy_(weights, masters)
    optimizer.overflow = False
    return False


def _in_float32(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Their gradients; zeros where there is none."""
    gradients = [torch.zeros_like(w, dtype=torch.float32) if w.grad is None else w.grad for w in weights]
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return gradients
    wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
    torch._foreach_copy_(wide, gradients)
    return wide
