"""Matrix products on CPUs, where torch's choice is not always the fastest: on a GPU nothing here does anything.

bfloat16 on a processor without instructions for it: weights and activations stay bfloat16, products run in float32. A
product of bfloat16 matrices is exact in float32 up to the order of its sums, so only speed changes: torch emulates the
missing instructions about five times slower than it multiplies the same matrices in float32.

float32 with AVX-512 on a processor that Intel has not made: torch multiplies with MKL, which does not use AVX-512
there and is up to two and a half times as slow as oneDNN, which torch has, too. oneDNN compiles code for every shape
and keeps some of it for good, so it only sees rounded numbers of rows and, in attention, of keys.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn


@cache
def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself (AVX-512 BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@cache
def prefers_onednn() -> bool:
    """Whether float32 products are faster with oneDNN than with what torch takes."""
    cpuinfo = Path("/proc/cpuinfo")
    others = cpuinfo.is_file() and "GenuineIntel" not in cpuinfo.read_text()
    wide = torch.cpu.get_capabilities().get("avx512_f", False)
    return others and wide and torch.backends.mkl.is_available() and _onednn_keeps_float32()


@contextmanager
def onednn_products() -> Iterator[None]:
    """Within, torch multiplies float32 matrices with oneDNN.

    torch knows this as the permission to round them to bfloat16, of which oneDNN makes use with AMX alone. It is a
    setting of the process: for one thread at a time.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _onednn_keeps_float32() -> bool:
    """Whether oneDNN leaves the permission to round unused, by what it is built for and by trying."""
    if not torch.backends.mkldnn.is_available() or torch.cpu.get_capabilities().get("amx_bf16", False):
        return False
    left, right = torch.linspace(1.0, 2.0, 64 * 64).view(64, 64), torch.linspace(3.0, 1.0, 64 * 64).view(64, 64)
    with onednn_products():
        product = left @ right
    exact = left.double() @ right.double()
    return bool(((product - exact).abs() < 1e-5 * exact).all())


def best_products(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Within, matrices like `tensor` are multiplied as this machine does it best."""
    return onednn_products() if _by_onednn(tensor) else nullcontext()


def must_widen(tensor: torch.Tensor) -> bool:
    """Whether products with `tensor` are faster in float32."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not has_bfloat16()


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the precision in which its products run."""
    return tensor.float() if must_widen(tensor) else tensor


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[..., rows, in] x [out, in] -> [..., rows, out], without a gradient; both in the precision of the product."""
    rows = input.flatten(0, -2)
    with best_products(input):
        product = nn.functional.linear(padded_rows(rows), weight, bias)
    return product[: len(rows)].unflatten(0, input.shape[:-1])


def weight_gradient(gradient: torch.Tensor, input: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
    """[rows, out] x [rows, in] -> [out, in], added to `total` in place where there is one; without a gradient."""
    gradient, input = padded_rows(gradient).T, padded_rows(input)
    with best_products(input):
        return gradient @ input if total is None else torch.addmm(total, gradient, input, out=total)


def compiles_every_length(dtype: torch.dtype) -> bool:
    """Whether products on this CPU are oneDNN's, which compiles code for every number of rows."""
    return prefers_onednn() or (dtype == torch.bfloat16 and has_bfloat16())


def _by_onednn(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and prefers_onednn()


def padded_rows(rows: torch.Tensor) -> torch.Tensor:
    """[rows, columns] with rows of zeros up to the number that oneDNN is to see; as they are where it sees none."""
    missing = rounded_rows(len(rows)) - len(rows) if _by_onednn(rows) else 0
    return nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def padded_index(index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Indices [rows] of what products in `dtype` will see, with zeros up to the number that they are to see."""
    compiled = index.device.type == "cpu" and compiles_every_length(dtype)
    return nn.functional.pad(index, (0, rounded_rows(len(index)) - len(index))) if compiled else index


def rounded_rows(rows: int) -> int:
    """The next multiple of 16, above 512 rows the next number of five significant binary digits.

    That is at most a sixteenth more for many rows, and about a hundred numbers in all.
    """
    step = max(16, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // step) * step


class CpuLinear(nn.Linear):
    """A linear layer that multiplies as this CPU does it best, and is nn.Linear everywhere else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        same = input.dtype == self.weight.dtype and input.device.type == "cpu"
        if same and (must_widen(input) or _by_onednn(input)):
            return _Product.apply(input, self.weight, self.bias)
        return super().forward(input)


def use_best_products(model: nn.Module) -> None:
    """Make every plain nn.Linear of a model a CpuLinear, in place; parameters and their names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = CpuLinear


class _Product(torch.autograd.Function):
    """Keeps the operands as they are for the backward pass, and widens them again there."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(input)
        ctx.weight = weight  # not a saved tensor: ZeRO-3 swaps a parameter's storage
        product = linear(widened(input), widened(weight), None if bias is None else widened(bias))
        return product.to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = widened(gradients[0])
        (input,) = ctx.saved_tensors
        to_input = linear(gradient, widened(ctx.weight).T).to(input.dtype) if ctx.needs_input_grad[0] else None
        rows = gradient.flatten(0, -2)
        to_weight = weight_gradient(rows, widened(input.flatten(0, -2))) if ctx.needs_input_grad[1] else None
        return to_input, to_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
