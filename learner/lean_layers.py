"""Layers that keep less for the backward pass: what is cheap to compute from what is kept anyway is computed again.

For each token Hugging Face's norms keep their input, the normalised input and, as the input of the next product, their
output; its gated MLPs keep both projections, the activation and the product. Here a norm keeps its input, a number and
its output, a gated MLP its two projections: in a Llama that is 3/5 of the memory.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


def use_lean_layers(model: nn.Module) -> None:
    """Make every RMS norm and gated MLP of a model lean, in place; parameters, their names and results stay.

    A layer that holds more than the lean one knows of, or computes anything else of small, middling and large probes,
    to the last bit, stays as it is.
    """
    for module in list(model.modules()):
        for lean in (LeanNorm, LeanGatedMlp):
            if lean.fits(module) and not isinstance(module, lean):
                _replace(module, lean)


@torch.no_grad()
def _replace(module: nn.Module, lean: type[nn.Module]) -> None:
    """Give a module the lean class where both compute the same of probes."""
    parameter = next(module.parameters())
    shape = (4, parameter.shape[-1])
    waves = torch.linspace(-2, 2, shape[0] * shape[1], device=parameter.device).sin().view(shape)
    probe = torch.stack([waves * size for size in (1e-3, 1.0, 1e3)]).to(parameter.dtype)  # some layers clamp
    plain = type(module)
    expected = module(probe)
    module.__class__ = _lean_class(lean, plain)  # type: ignore[arg-type]
    if not torch.equal(module(probe), expected):
        module.__class__ = plain


@cache
def _lean_class(lean: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Lean{plain.__name__}", (lean, plain), {})


class LeanNorm(nn.Module):
    """An RMS norm, weight * input / rms(input)."""

    weight: nn.Parameter

    @staticmethod
    def fits(module: nn.Module) -> bool:
        held = [name for name, _ in module.named_parameters()]
        return type(module).__name__.endswith("RMSNorm") and _epsilon(module) is not None and held == ["weight"]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]"""
        return _RmsNorm.apply(hidden_states, self.weight, _epsilon(self))


def _epsilon(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        scale = input.float().pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(input, scale)
        ctx.weight = weight  # not a saved tensor: ZeRO-3 swaps a parameter's storage
        return (input.float() * scale).to(input.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, scale = ctx.saved_tensors
        normalised, weight = input.float() * scale, ctx.weight.float()
        by_weight = gradients[0] * normalised
        along = (by_weight @ weight).div_(len(weight))[..., None]
        to_input = (gradients[0].float() * weight).addcmul_(normalised, along, value=-1).mul_(scale)
        to_weight = by_weight.flatten(0, -2).sum(0).to(ctx.weight.dtype) if ctx.needs_input_grad[1] else None
        return to_input.to(input.dtype), to_weight, None


class LeanGatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x))"""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    @staticmethod
    def fits(module: nn.Module) -> bool:
        own = [name for name, _ in module.named_parameters(recurse=False)]
        parts = {name for name, _ in module.named_children()}
        return (
            parts == {"gate_proj", "up_proj", "down_proj", "act_fn"}
            and not own
            and not list(module.get_submodule("act_fn").parameters())
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]"""
        product = _Gated.apply(self.gate_proj(x), self.up_proj(x), self.act_fn)
        node, address = product.grad_fn, product.data_ptr()

        def keep(tensor: torch.Tensor) -> torch.Tensor | torch.Size:
            return tensor.shape if node is not None and tensor.data_ptr() == address else tensor

        def recall(kept: torch.Tensor | torch.Size) -> torch.Tensor:
            return kept if isinstance(kept, torch.Tensor) else _Gated.product(node).view(kept)

        with saved_tensors_hooks(keep, recall):
            return self.down_proj(product)


class _Gated(torch.autograd.Function):
    """activation(gate) * up; on the way back the activation is computed once, for whoever needs it first."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.activated = activation, None
        active = activation(gate)
        return active * up if active is gate else active.mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, active = _Gated.activated(ctx)
        ctx.activated = None
        (to_gate,) = torch.autograd.grad(active, gate, gradients[0] * up)
        return to_gate, gradients[0] * active.detach(), None

    @staticmethod
    def product(ctx: Any) -> torch.Tensor:
        """The output again, before `backward`."""
        _, up, active = _Gated.activated(ctx)
        return active.detach() * up

    @staticmethod
    def activated(ctx: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate, up, and activation(gate) with a gradient to gate; kept until `backward` has used it."""
        if ctx.activated is None:
            gate, up = ctx.saved_tensors  # once only: gradient checkpointing has them no second time
            with torch.enable_grad():
                gate = gate.detach().requires_grad_()
                ctx.activated = gate, up, ctx.activation(gate)
        return ctx.activated
