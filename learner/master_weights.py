"""The step of DeepSpeed's float32 copies of bfloat16 weights, on lists of tensors.

DeepSpeed's own step under stage 0 goes tensor by tensor and asks the device about each: 5,448 operations and 275 waits
for SmolLM2-135M, 68 ms on an H200 where plain PyTorch takes 12. Here it goes by lists, and waits once. Float32 copies
of bfloat16 gradients exist a bounded piece at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

_ON_CPU, _ON_CUDA = 1 << 24, 1 << 28
# Elements of a piece, unless one tensor has more: 64 MiB, and on a GPU, where a piece costs launches, 1 GiB.


def step_master_weights(optimizer: Any) -> bool:
    """In place of `optimizer.step`, a FP16_UnfusedOptimizer's; returns whether a gradient was not finite.

    Then nothing changes, the gradients are dropped, and the norm is infinity.
    """
    masters = [master for group in optimizer.fp32_groups for master in group]
    weights = [weight for group in optimizer.fp16_groups for weight in group]
    pieces = list(_pieces(weights, _ON_CUDA if weights[0].is_cuda else _ON_CPU))
    norm = get_total_norm([get_total_norm(_float32_gradients(weights[piece])) for piece in pieces])
    optimizer._global_grad_norm = float(norm)
    if not optimizer._global_grad_norm < float("inf"):
        return optimizer._skip_invalid_grad_norm()
    for piece in pieces:
        for master, gradient in zip(masters[piece], _float32_gradients(weights[piece]), strict=True):
            master.grad = gradient
        if optimizer.clip_grad > 0:
            clip_grads_with_norm_(masters[piece], optimizer.clip_grad, norm)
        optimizer.optimizer.step()  # of those that have a gradient now
        for tensor in (*masters[piece], *weights[piece]):
            tensor.grad = None
        with torch.no_grad():
            torch._foreach_copy_(weights[piece], masters[piece])
    optimizer.overflow = False
    return False


def _pieces(weights: list[torch.Tensor], elements: int) -> Iterator[slice]:
    """Slices of neighbouring weights that together have at most so many elements, or of one that has more."""
    first = size = 0
    for index, weight in enumerate(weights):
        if index > first and size + weight.numel() > elements:
            yield slice(first, index)
            first, size = index, 0
        size += weight.numel()
    yield slice(first, len(weights))


def _float32_gradients(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Their gradients; zeros where there is none."""
    gradients = [torch.zeros_like(w, dtype=torch.float32) if w.grad is None else w.grad for w in weights]
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return gradients
    wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
    torch._foreach_copy_(wide, gradients)
    return wide
