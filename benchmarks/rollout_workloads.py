"""What rollouts are measured on: a model, a catalogue and prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.shapes import ON_GPU, SHAPES, build
from catalog.atomic import atomic_folder
from catalog.trie import Trie

EOS = 0
PROMPT_TOKENS = 200


@dataclass(frozen=True)
class RolloutWorkload:
    """Everything on disk but the prompts, so that engines in other processes can take it too."""

    name: str
    model_path: Path
    trie_path: Path
    prompts: Sequence[Sequence[int]]
    generate_groups: int
    """Groups at a time that make Hugging Face `generate` fastest."""
    repeats: int
    kv_cache_gib: float
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_batched_tokens: int = 16384 if ON_GPU else 4096
    """Tokens of one forward pass of ours; the tiny model's are those that make it fastest."""


def tiny(folder: Path, groups: int = 64, titles: int = 500) -> RolloutWorkload:
    """A Qwen2 of two layers (about 200,000 parameters) and a generated catalogue."""
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {**shape, "num_key_value_heads": 1, "vocab_size": 1536, "initializer_range": 0.2}
    at_once = 64 if ON_GPU else 32
    name = f"tiny-{groups}"
    made = _random_workload(name, folder, "qwen2", config, groups, titles, at_once, repeats=4, kv_cache_gib=1.0)
    return replace(made, max_batched_tokens=16384)


def middle(folder: Path, groups: int = 8) -> RolloutWorkload:
    """The shape of SmolLM2-135M with random weights."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = {**shape, "num_key_value_heads": 3, "vocab_size": 49152}
    return _random_workload(f"135m-{groups}", folder, "llama", config, groups, 500, 4, repeats=1, kv_cache_gib=2.0)


def many(folder: Path, groups: int = 64) -> RolloutWorkload:
    """The same with more groups, in bfloat16: what a GPU is for."""
    return replace(middle(folder, groups), generate_groups=groups, repeats=3, kv_cache_gib=16.0, dtype="bfloat16")


def half_a_billion(folder: Path, groups: int = 64) -> RolloutWorkload:
    """The shape of Qwen2-0.5B with random weights, in bfloat16."""
    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    config = {**shape, "num_key_value_heads": 2, "vocab_size": 151936}
    made = _random_workload(
        f"0.5b-{groups}", folder, "qwen2", config, groups, 500, groups, repeats=3, kv_cache_gib=16.0
    )
    return replace(made, dtype="bfloat16")


def industrial(groups: int = 8) -> RolloutWorkload:
    """SmolLM2-135M with real prompts and titles (MODEL=, DATA=). Raises ShapeAbsentError where they are not here."""
    workload = build(replace(SHAPES["industrial-135m-fp32"], groups=groups))
    prompts = workload.prompts(workload.step_examples(0))
    trie_path = workload.catalog.path / "trie.arrow"
    return RolloutWorkload(f"industrial-{groups}", workload.model_path, trie_path, prompts, 4, 1, 2.0)


def _random_workload(
    name: str,
    folder: Path,
    model_type: str,
    config: Mapping[str, float],
    groups: int,
    titles: int,
    generate_groups: int,
    *,
    repeats: int,
    kv_cache_gib: float,
) -> RolloutWorkload:
    vocabulary = int(config["vocab_size"])
    model_path, trie_path = folder / f"{model_type}-{vocabulary}", folder / f"{vocabulary}-{titles}.arrow"
    if not model_path.is_dir():
        _save_random_model(model_path, model_type, config)
    product_trie(titles, vocabulary).save(trie_path)
    prompts = np.random.default_rng(1).integers(1, vocabulary, (groups, PROMPT_TOKENS)).tolist()
    return RolloutWorkload(name, model_path, trie_path, prompts, generate_groups, repeats, kv_cache_gib)


def _save_random_model(path: Path, model_type: str, config: Mapping[str, float]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    ends = {"eos_token_id": EOS, "pad_token_id": EOS, "bos_token_id": None}
    full = AutoConfig.for_model(model_type, **config, **ends, tie_word_embeddings=True, max_position_embeddings=2048)
    model = AutoModelForCausalLM.from_config(full)
    with atomic_folder(path) as temporary:
        model.save_pretrained(temporary)


def product_trie(titles: int, vocabulary: int, seed: int = 0) -> Trie:
    """Titles of 10 to 15 tokens: a brand and a category that titles share, then a tail of their own."""
    draw = np.random.default_rng(seed)
    brands = [draw.integers(1, vocabulary, draw.integers(1, 4)).tolist() for _ in range(max(24, titles // 200))]
    categories = [draw.integers(1, vocabulary, draw.integers(1, 3)).tolist() for _ in range(60)]
    distinct: dict[tuple[int, ...], None] = {}
    while len(distinct) < titles:
        length = int(draw.integers(9, 15))
        start = brands[draw.integers(len(brands))] + categories[draw.integers(len(categories))]
        tail = draw.integers(1, vocabulary, length).tolist()
        distinct[(*start, *tail)[:length]] = None
    return Trie.from_titles([[*title, EOS] for title in distinct], eos_token=EOS, tokenizer_fingerprint="random")
