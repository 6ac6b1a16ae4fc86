"""Models that vLLM keeps in another form than Hugging Face take new weights, verified, and compute alike."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_oracle import assert_same_scores, save_random_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from learner.export import named_as_saved
from rollout.config import RolloutConfig
from rollout.engines import create_engine
from rollout.weights import WeightBucket, checksum

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
HEADS = {"num_key_value_heads": 1, "head_dim": 32}
CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "gpt2-transposed": lambda **ends: GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=256, **ends),
    "bloom-interleaved-heads": lambda **ends: BloomConfig(hidden_size=64, n_layer=2, n_head=2, **ends),
    "mixtral-renamed-experts": lambda **ends: MixtralConfig(
        **SHAPE, **HEADS, intermediate_size=96, num_local_experts=4, **ends
    ),
    "qwen3-moe-experts-in-one": lambda **ends: Qwen3MoeConfig(
        **SHAPE, **HEADS, intermediate_size=128, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, **ends
    ),
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_new_weights_are_verified_and_compute_as_hugging_face(
    architecture: str, tiny_tokenizer_dir: Path, trie_path: Path, tmp_path: Path
) -> None:
    save_random_model(CONFIGS[architecture], tiny_tokenizer_dir, tmp_path)
    learner = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    engine = create_engine(tmp_path, trie_path, RolloutConfig(kv_cache_gib=0.05, max_batched_tokens=1024))
    try:
        for seed in (0, 1):
            change(learner, seed)
            sent = named_as_saved(learner, [(name, weight.detach()) for name, weight in learner.named_parameters()])
            assert engine.load_weights([WeightBucket.pack(sent)]) == checksum(sent)
            assert_same_scores(engine, learner)
        damaged = WeightBucket.pack(sent)
        damaged.data[1234] ^= 4
        assert engine.load_weights([damaged]) != checksum(sent)
    finally:
        engine.shutdown()


@torch.no_grad()
def change(model: PreTrainedModel, seed: int) -> None:
    """Other weights, biases that were all alike included."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
