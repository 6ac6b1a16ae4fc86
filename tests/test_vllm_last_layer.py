"""A vLLM model's last layer computes a prompt's last token alone, and the results are the model's own."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_oracle import assert_same_scores, generate, ragged_prompts, save_random_model, worker_of
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from rollout.config import RolloutConfig
from rollout.engines import create_engine
from rollout.vllm_internals import UnsupportedModelError
from rollout.vllm_last_layer import LastLayerHooks

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": lambda **ends: LlamaConfig(**SHAPE, **ends),
    "mistral": lambda **ends: MistralConfig(**SHAPE, sliding_window=None, **ends),
    "qwen2": lambda **ends: Qwen2Config(**SHAPE, **ends),
    "qwen3": lambda **ends: Qwen3Config(**SHAPE, **ends),
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_last_layer_computes_last_tokens_alone(
    architecture: str, tiny_tokenizer_dir: Path, trie_path: Path, tmp_path: Path
) -> None:
    save_random_model(CONFIGS[architecture], tiny_tokenizer_dir, tmp_path)
    engine = create_engine(tmp_path, trie_path, RolloutConfig(kv_cache_gib=0.05, max_batched_tokens=1024))
    try:
        assert_same_scores(engine, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())
        rows = computed_rows(engine, prompts := [[7] * 30, list(range(1, 51))])
        assert rows[0] - rows[-1] == sum(map(len, prompts)) - len(prompts)
        assert rows[0] == rows[1]
    finally:
        engine.shutdown()


def computed_rows(engine: Any, prompts: list[list[int]]) -> list[int]:
    """How many tokens the MLP of each layer computes while candidates are searched."""
    layers = worker_of(engine).model_runner.model.model.layers
    rows = [0] * len(layers)

    def counting(index: int) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows[index] += len(inputs[0])

        return hook

    hooks = [layer.mlp.register_forward_pre_hook(counting(index)) for index, layer in enumerate(layers)]
    generate(engine, prompts, 4)
    for hook in hooks:
        hook.remove()
    return rows


@pytest.mark.parametrize("tokens_per_pass", [1024, 48])
def test_it_changes_no_result(worker_engine: Any, monkeypatch: pytest.MonkeyPatch, tokens_per_pass: int) -> None:
    """Also where a pass ends inside a prompt, and where prompts begin alike."""
    model, prompts = worker_of(worker_engine).paged_model, ragged_prompts(24)
    monkeypatch.setattr(model, "max_batched_tokens", tokens_per_pass)
    assert model._last_layer is not None
    limited = generate(worker_engine, prompts, 16)
    monkeypatch.setattr(model, "_last_layer", None)
    for one, other in zip(limited, generate(worker_engine, prompts, 16), strict=True):
        assert one.item_class.tolist() == other.item_class.tolist()
        for ours, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert abs(ours - theirs).max() < 1e-5


def test_a_model_that_computes_other_rows_is_refused(worker_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = worker_of(worker_engine).paged_model
    monkeypatch.setattr(model._last_layer, "only", lambda tokens: nullcontext())
    with pytest.raises(UnsupportedModelError, match=r"returned 30 hidden states, not 1: use rollout.engine=requests"):
        generate(worker_engine, [[7] * 30], 4)


@pytest.mark.parametrize("change", ["compiled", "elsewhere"])
def test_a_model_that_knows_no_hooks_or_is_not_vllms_stays(
    worker_engine: Any, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    from vllm.config import CompilationMode

    runner = worker_of(worker_engine).model_runner
    assert LastLayerHooks.of(runner.model, runner.vllm_config) is not None
    if change == "compiled":
        monkeypatch.setattr(runner.vllm_config.compilation_config, "mode", CompilationMode.VLLM_COMPILE)
    else:
        monkeypatch.setattr(type(runner.model.model.layers[-1]), "__module__", "transformers.models.qwen2")
    assert LastLayerHooks.of(runner.model, runner.vllm_config) is None
