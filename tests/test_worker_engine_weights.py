"""The worker engine holds the weights that it was given, verified, also after it has slept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_oracle import generate, named_weights, ragged_prompts, token_logprobs
from search_oracle import plain_beam_search
from transformers import AutoModelForCausalLM

from catalog.trie import Trie
from rollout.config import RolloutConfig
from rollout.engines import create_engine
from rollout.weights import WeightBucket, WeightsError, checksum


def test_new_weights_are_used_at_once_and_verified(worker_engine: Any, tiny_model_dir: Path, trie: Trie) -> None:
    learner = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    prompts = ragged_prompts(64)[:6]
    before = generate(worker_engine, prompts, 8)
    original = [WeightBucket.pack(named_weights(learner))]
    with torch.no_grad():
        for i, parameter in enumerate(learner.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    buckets = [WeightBucket.pack(named_weights(learner)[start::2]) for start in (0, 1)]
    assert worker_engine.load_weights(buckets) == checksum(named_weights(learner))
    after = generate(worker_engine, prompts, 8)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        expected = plain_beam_search(trie, token_logprobs(learner, trie, prompt).__getitem__, 8)
        assert new.item_class.tolist() == [item_class for _, item_class, _ in expected]
        np.testing.assert_allclose(new.score, [score for score, *_ in expected], atol=1e-4)
        assert not np.allclose(new.score, old.score, atol=1e-2)
    worker_engine.load_weights(original)
    for old, again in zip(before, generate(worker_engine, prompts, 8), strict=True):
        np.testing.assert_array_equal(old.score, again.score)


def test_damaged_weights_show_in_the_checksum(worker_engine: Any, model: Any) -> None:
    bucket = WeightBucket.pack(named_weights(model))
    bucket.data[12_345] ^= 4
    try:
        assert worker_engine.load_weights([bucket]) != checksum(named_weights(model))
    finally:
        assert worker_engine.load_weights([WeightBucket.pack(named_weights(model))]) == checksum(named_weights(model))


def test_missing_and_mistyped_weights_are_errors(worker_engine: Any, model: Any) -> None:
    named = named_weights(model)
    try:
        with pytest.raises(WeightsError, match=r"missing \['model.norm.weight'\]"):
            worker_engine.load_weights([WeightBucket.pack(named[:-1])])
        with pytest.raises(WeightsError, match=r"torch.bfloat16.*rollout.dtype"):
            worker_engine.load_weights([WeightBucket.pack([(name, tensor.bfloat16()) for name, tensor in named])])
    finally:
        worker_engine.load_weights([WeightBucket.pack(named)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is packed, and logits tell")
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"])
def test_weights_that_are_not_finite_are_refused_and_others_load_after_them(
    worker_engine: Any, model: Any, name: str
) -> None:
    named, prompts = named_weights(model), ragged_prompts(64)[:6]
    before = generate(worker_engine, prompts, 8)
    broken = [(other, tensor * torch.nan if other == name else tensor) for other, tensor in named]
    try:
        with pytest.raises(WeightsError, match=rf"{name.removesuffix('.weight')} .* not finite .*learning_rate"):
            worker_engine.load_weights([WeightBucket.pack(broken)])
    finally:
        assert worker_engine.load_weights([WeightBucket.pack(named)]) == checksum(named)
    for old, again in zip(before, generate(worker_engine, prompts, 8), strict=True):
        np.testing.assert_array_equal(old.score, again.score)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is vLLM's sleep mode")
def test_an_engine_that_sleeps_holds_nothing_and_wakes_with_the_next_weights(
    worker_engine: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(worker: Any) -> list[int]:
        """Packed matrices, and whole pages of each layer's cache and of the embedding that are not zero."""
        runner = worker.model_runner
        packed = [module for module in runner.model.modules() if hasattr(module, "cpu_linear")]
        tensors = [*runner.kv_caches, runner.model.model.embed_tokens.weight]
        pages = [tensor.detach().flatten()[2048:-2048].unfold(0, 1024, 1024) for tensor in tensors]
        return [len(packed), *(int(page.any(1).sum()) for page in pages)]

    monkeypatch.setattr("rollout.vllm_sleep.WORTH_RETURNING", 0)
    prompts = ragged_prompts(64)[:6]
    weights = [WeightBucket.pack(named_weights(model))]
    before = generate(worker_engine, prompts, 8)
    assert all(worker_engine._llm.collective_rpc(held)[0])
    worker_engine.sleep()
    assert not any(worker_engine._llm.collective_rpc(held)[0])
    assert worker_engine.load_weights(weights) == checksum(named_weights(model))
    for old, again in zip(before, generate(worker_engine, prompts, 8), strict=True):
        np.testing.assert_array_equal(old.score, again.score)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 1e-2)])
def test_on_a_gpu_scores_are_the_models_own_before_and_after_sleep(
    tiny_model_dir: Path, trie_path: Path, trie: Trie, dtype: str, tolerance: float
) -> None:
    """tolerance: of scores, relative to the largest. Only the second engine sleeps: one of a process can."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    import vllm.envs

    vllm.envs.disable_envs_cache()  # an engine of this process has frozen what it found
    sleeps = dtype == "bfloat16"
    config = RolloutConfig(kv_cache_gib=0.05, dtype=dtype, max_batched_tokens=1024, sleep=sleeps)  # type: ignore[arg-type]
    engine = create_engine(tiny_model_dir, trie_path, config)
    learner = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=getattr(torch, dtype)).eval()
    weights, reference = named_weights(learner), learner.float()
    prompts = ragged_prompts(64)[::3]
    exact = [
        plain_beam_search(trie, token_logprobs(reference, trie, prompt).__getitem__, trie.num_classes)
        for prompt in prompts
    ]
    for _ in range(2):
        for group, best in zip(generate(engine, prompts, 16), exact, strict=True):
            score = {item_class: value for value, item_class, _ in best}
            rounding = tolerance * max(map(abs, score.values()))
            np.testing.assert_allclose(group.score, [score[c] for c in group.item_class.tolist()], atol=rounding)
            assert (np.diff(group.score) <= 0).all()
            assert len(set(group.item_class.tolist())) == 16
        if sleeps:
            engine.sleep()
        assert engine.load_weights([WeightBucket.pack(weights)]) == checksum(weights)
    engine.shutdown()
