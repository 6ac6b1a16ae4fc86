"""Lean layers compute what the layers they replace compute, and keep less."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from learner.lean_layers import LeanGatedMlp, LeanNorm, use_lean_layers
from tests.test_policy import SHAPE

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE),
}


def model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").to(dtype)
    for parameter in lm.parameters():
        if parameter.dim() == 1:  # norms of ones would hide their weights
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return lm


def gradients(lm: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Logits, gradients, and the bytes that the forward pass leaves allocated."""
    tokens = torch.randint(0, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        logits = lm(input_ids=tokens, use_cache=False).logits
    kept = sum(event.self_cpu_memory_usage for event in profiled.events())
    logits.float().log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in lm.named_parameters()}, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_results_and_gradients_stay(name: str, dtype: torch.dtype) -> None:
    plain, lean = model(name, dtype), model(name, dtype)
    use_lean_layers(lean)
    logits, expected, _ = gradients(plain)
    found_logits, found, _ = gradients(lean)
    assert torch.equal(found_logits, logits)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for parameter, gradient in expected.items():
        torch.testing.assert_close(
            found[parameter], gradient, rtol=0, atol=tolerance * float(gradient.abs().max() + 1e-6), msg=parameter
        )


def test_less_is_kept() -> None:
    plain, lean = model("llama", torch.float32), model("llama", torch.float32)
    use_lean_layers(lean)
    for layer in lean.model.layers:
        assert isinstance(layer.mlp, LeanGatedMlp)
        assert isinstance(layer.input_layernorm, LeanNorm)
    shape = lean.config
    tokens = 2 * 40
    # two normalised inputs of each layer and one of the last norm; activation and product of each layer
    spared = tokens * (2 * shape.num_hidden_layers + 1) * shape.hidden_size
    spared += tokens * 2 * shape.num_hidden_layers * shape.intermediate_size
    assert gradients(lean)[2] <= gradients(plain)[2] - 4 * spared


def test_checkpointed_layers_keep_their_inputs_alone() -> None:
    kept = []
    for lm in (model("llama", torch.float32), model("llama", torch.float32)):
        if kept:
            use_lean_layers(lm)
        lm.train()
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        kept.append(gradients(lm)[2])
    assert kept[1] <= kept[0]


def test_an_activation_is_computed_twice_in_all() -> None:
    """Forward, and once on the way back, whichever of its two users comes first."""
    lean = model("llama", torch.float32)
    use_lean_layers(lean)
    mlp, calls = lean.model.layers[0].mlp, []
    mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    states = torch.randn(3, lean.config.hidden_size)
    mlp(states).sum().backward()
    assert len(calls) == 2
    mlp.down_proj.requires_grad_(False)  # then nobody asks for the product again
    mlp(states).sum().backward()
    assert len(calls) == 4


def test_a_trained_projection_behind_frozen_ones_has_its_gradient() -> None:
    plain, lean = model("llama", torch.float32), model("llama", torch.float32)
    use_lean_layers(lean)
    states, found = torch.randn(3, lean.config.hidden_size), []
    for lm in (plain, lean):
        mlp = lm.model.layers[0].mlp.requires_grad_(False)
        mlp.down_proj.requires_grad_(True)
        mlp(states).sum().backward()
        found.append(mlp.down_proj.weight.grad)
    torch.testing.assert_close(*found)


def test_a_layer_that_holds_more_or_clamps_stays_as_it_is() -> None:
    class Clamped(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10.0)) * self.up_proj(x))

    class Scaled(LlamaMLP):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    class BareRMSNorm(torch.nn.Module):
        eps = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.pow(2).mean(-1, keepdim=True).add(self.eps).rsqrt()

    config = CONFIGS["llama"]()
    layers = torch.nn.ModuleList([Clamped(config), Scaled(config), BareRMSNorm(), LlamaMLP(config)])
    use_lean_layers(layers)
    assert [isinstance(layer, LeanGatedMlp | LeanNorm) for layer in layers] == [False, False, False, True]


def test_a_norm_of_another_formula_stays_as_it_is() -> None:
    lm = model("gemma2", torch.float32)  # multiplies by 1 + weight
    use_lean_layers(lm)
    assert not isinstance(lm.model.norm, LeanNorm)
    assert isinstance(lm.model.layers[0].mlp, LeanGatedMlp)
