"""bfloat16 on CPUs without instructions for it: weights and activations stay bfloat16, products run in float32.

A product of bfloat16 matrices is exact in float32 up to the order of its sums, so only speed changes: torch emulates
the missing instructions about five times slower than it multiplies the same matrices in float32.
"""

from functools import cache
from typing import Any

import torch
from torch import nn


@cache
def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself (AVX-512 BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def must_widen(tensor: torch.Tensor) -> bool:
    """Whether products with `tensor` are faster in float32."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not has_bfloat16()


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the precision in which its products run."""
    return tensor.float() if must_widen(tensor) else tensor


class WideLinear(nn.Linear):
    """A linear layer that widens its operands where the CPU asks for it, and is nn.Linear everywhere else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        if must_widen(self.weight) and input.dtype == torch.bfloat16:
            return _WideProduct.apply(input, self.weight, self.bias)
        return super().forward(input)


def widen_linears(model: nn.Module) -> None:
    """Make every plain nn.Linear of a model a WideLinear, in place; parameters and their names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WideLinear


class _WideProduct(torch.autograd.Function):
    """Keeps the bfloat16 operands for the backward pass and widens them again there."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(input)
        ctx.weight = weight  # not a saved tensor: ZeRO-3 swaps a parameter's storage
        product = nn.functional.linear(input.float(), weight.float(), None if bias is None else bias.float())
        return product.to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = gradients[0].float()
        (input,) = ctx.saved_tensors
        to_input = (gradient @ ctx.weight.float()).to(input.dtype) if ctx.needs_input_grad[0] else None
        rows = gradient.flatten(0, -2)
        to_weight = rows.T @ input.flatten(0, -2).float() if ctx.needs_input_grad[1] else None
        return to_input, to_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
