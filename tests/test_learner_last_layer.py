"""A policy's last layer computes the tokens that have a target alone, and nothing else changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig

from learner.attention import tree_attention
from learner.last_layer import LastLayer, use_last_layer
from learner.packing import PackedBatch
from learner.policy import Policy
from learner.products import padded_index, rounded_rows
from learner.tree_mask import TreeMask
from tests.test_policy import CONFIGS, SHAPE, groups, language_model

LIMITED = ["qwen2", "qwen2-tied-sliding", "qwen3", "llama", "mistral-sliding", "granite-scaled-logits"]


def last_of(policy: Policy) -> Any:
    return policy.lm.base_model.layers[-1]


def long_groups() -> tuple[list[list[int]], list[list[Any]]]:
    """With runs of attention that no token with a target is in."""
    prompts, candidates = groups()
    return [[7] * 300 + prompt.tolist() for prompt in prompts], candidates


def gradients(policy: Policy, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logp = policy(batch)
    logp.square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in policy.lm.named_parameters()}
    policy.zero_grad()
    return logp.detach(), found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", LIMITED)
def test_results_and_gradients_stay(name: str, checkpointing: bool) -> None:
    lm = language_model(name)
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train()
    policy = Policy(lm)
    last, batch = last_of(policy), policy.pack(*long_groups())
    assert isinstance(last, LastLayer)
    logp, found = gradients(policy, batch)
    last.__class__ = type(last).__mro__[2]
    assert not isinstance(last, LastLayer)
    expected_logp, expected = gradients(policy, batch)
    torch.testing.assert_close(logp, expected_logp, rtol=0, atol=1e-5)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(
            found[parameter], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max() + 1e-3), msg=parameter
        )


def test_the_last_mlp_computes_tokens_with_a_target() -> None:
    policy = Policy(language_model("llama"))
    batch = policy.pack(*groups())
    computed: list[int] = []
    for layer in policy.lm.base_model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0][0].shape[0]))
    policy(batch)
    assert computed == [batch.tokens.numel(), batch.tokens.numel(), len(padded_index(batch.rows, torch.float32))]
    assert len(batch.rows) < batch.fed_tokens


def test_hugging_faces_own_passes_are_whole() -> None:
    """As in generation, and in SFT that feeds no tree."""
    lm = language_model("llama")
    tokens = torch.arange(1, 30)[None]
    expected = lm(input_ids=tokens).logits
    Policy(lm)
    lm.set_attn_implementation("eager")
    torch.testing.assert_close(lm(input_ids=tokens).logits, expected)


def doubled(layer: nn.Module, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
    attended, _ = layer.self_attn(hidden_states=hidden_states, **others)
    return 2 * hidden_states + attended


def wants_more(layer: nn.Module, hidden_states: torch.Tensor, table: torch.Tensor, **others: Any) -> torch.Tensor:
    return hidden_states + table


def other_mask(layer: Any, hidden_states: torch.Tensor, attention_mask: Any = None, **others: Any) -> torch.Tensor:
    states = layer.input_layernorm(hidden_states)
    attended = hidden_states + layer.self_attn(hidden_states=states, attention_mask=None, **others)[0]
    return attended + layer.mlp(layer.post_attention_layernorm(attended))


def bends_sizes(layer: Any, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
    return hidden_states.view(-1, 64)


@pytest.mark.parametrize("forward", [doubled, wants_more, other_mask, bends_sizes])
def test_a_layer_that_computes_something_else_stays(forward: Callable[..., torch.Tensor]) -> None:
    lm = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    last = lm.model.layers[-1]
    last.__class__ = type("Unusual", (type(last),), {"forward": forward})
    use_last_layer(lm)
    assert type(last).__name__ == "Unusual"
    assert set(dict(last.named_children())) == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    assert isinstance(last.mlp, type(lm.model.layers[0].mlp))


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(LIMITED)))
def test_other_architectures_stay(name: str) -> None:
    assert not isinstance(last_of(Policy(language_model(name))), LastLayer)


def test_a_scaled_residual_stays() -> None:
    policy = Policy(AutoModelForCausalLM.from_config(GraniteConfig(**SHAPE, residual_multiplier=0.22)))
    assert not isinstance(last_of(policy), LastLayer)


def test_attention_leaves_out_runs_without_a_target() -> None:
    policy = Policy(language_model("llama"))
    batch = policy.pack(*long_groups())
    tree = TreeMask(batch.subtree_end, batch.positions[0], batch.rows)
    some, every = tree.of_rows().runs(None, 4, 4), tree.runs(None, 4, 4)
    assert 0 < len(some) < len(every)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 4, batch.tokens.numel(), 16, generator=generator) for _ in range(3)]
    whole, _ = tree_attention(policy, *tensors, None, tree=tree)
    limited, _ = tree_attention(policy, *tensors, None, tree=tree.of_rows())
    assert torch.equal(limited[:, batch.rows], whole[:, batch.rows])
    left_out = [run.queries for run in every if not run.has_target]
    assert all(not limited.flatten(0, 2)[queries].any() for queries in left_out)


def test_a_policys_last_attention_leaves_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, limited = Policy(language_model("llama")), []
    of_runs = TreeMask.runs
    monkeypatch.setattr(
        TreeMask, "runs", lambda tree, *some, **more: noted(limited, tree, of_runs(tree, *some, **more))
    )
    policy(policy.pack(*long_groups()))
    assert len(limited) == 3
    assert limited[2] < limited[1] == limited[0]


def noted(lengths: list[int], tree: TreeMask, runs: list[Any]) -> list[Any]:
    lengths.append(len(runs))
    return runs


def test_two_policies_can_share_a_model() -> None:
    lm = language_model("llama")
    assert last_of(Policy(lm)) is last_of(Policy(lm))


def test_a_layer_with_weights_of_its_own_stays() -> None:
    """Such as a gain that is 1 until it is trained."""
    lm = language_model("llama")
    lm.model.layers[-1].gain = nn.Parameter(torch.ones(()))
    assert not isinstance(last_of(Policy(lm)), LastLayer)


def test_compiled_products_see_rounded_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(language_model("llama"))
    batch, seen = policy.pack(*groups()), []
    expected = policy(batch)
    monkeypatch.setattr("learner.products.compiles_every_length", lambda dtype: True)
    last_of(policy).mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    torch.testing.assert_close(policy(batch), expected)
    assert seen == [rounded_rows(len(batch.rows))]
    assert seen[0] > len(batch.rows)
