"""The worker engine equals Hugging Face, holds the weights it was given, and refuses what it cannot do."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from search_oracle import plain_beam_search, random_titles
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from catalog.trie import Trie
from rollout.config import RolloutConfig, Strategy
from rollout.engines import create_engine
from rollout.groups import INCLUSION_WEIGHT, Candidates, group_table, validate_groups
from rollout.vllm_arguments import EngineError
from rollout.vllm_internals import RUNNER_NAMES, PagedModel, UnsupportedModelError
from rollout.weights import WeightBucket, WeightsError, checksum

VOCABULARY = 250
"""Token ids below this are used; every byte-level tokenizer has them."""


@pytest.fixture(scope="session")
def eos(tiny_tokenizer_dir: Path) -> int:
    from transformers import AutoTokenizer

    return int(AutoTokenizer.from_pretrained(tiny_tokenizer_dir).eos_token_id)


@pytest.fixture(scope="session")
def trie(eos: int) -> Trie:
    """70 titles with shared beginnings, forced chains, and titles that are beginnings of others."""
    used = [token for token in range(1, VOCABULARY) if token != eos]
    titles = [[*(used[token] for token in title[:-1]), eos] for title in random_titles(1, 60, 40, 12)]
    return Trie.from_titles(titles, eos_token=eos, tokenizer_fingerprint="none")


@pytest.fixture(scope="session")
def trie_path(trie: Trie, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trie") / "trie.arrow"
    trie.save(path)
    return path


@pytest.fixture(scope="session")
def engine(tiny_model_dir: Path, trie_path: Path) -> Iterator[Any]:
    config = RolloutConfig(kv_cache_gib=0.05, max_batched_tokens=1024)
    engine = create_engine(tiny_model_dir, trie_path, config)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def model(tiny_model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


def ragged_prompts(count: int) -> list[list[int]]:
    """Prompts of 1 to 90 tokens, of which some start alike and two are equal."""
    draw = np.random.default_rng(0)
    common = draw.integers(1, VOCABULARY, 50).tolist()
    prompts = [draw.integers(1, VOCABULARY, draw.integers(1, 91)).tolist() for _ in range(count)]
    return [common + prompt[:40] if i % 3 == 0 else prompt for i, prompt in enumerate(prompts[:-1])] + [prompts[1]]


def generate(engine: Any, prompts: list[list[int]], beams: int) -> list[Candidates]:
    none = [0] * len(prompts)
    return engine.generate(prompts, none, none, group_size=beams)


class TrieMask(LogitsProcessor):
    """Forbids every token that does not continue a title; a finished or lost beam gets end-of-sequence."""

    def __init__(self, trie: Trie, prompt_tokens: int) -> None:
        self.trie, self.prompt_tokens = trie, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -1e6)
        for row, tokens in enumerate(input_ids[:, self.prompt_tokens :].tolist()):
            node: int | None = 0
            for token in tokens:
                node = self.trie.step(node, token) if node is not None and node >= 0 else None
            if node is not None and node >= 0:
                masked[row, self.trie.children(node)[0].tolist()] = 0
        return scores + masked


def hugging_face_beams(model: Any, trie: Trie, prompt: list[int], beams: int) -> list[tuple[list[int], float]]:
    """What `generate` finds: (tokens, score), best first."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        length_penalty=0.0,
        max_new_tokens=trie.max_tokens,
        eos_token_id=trie.eos_token,
        pad_token_id=trie.eos_token,
        logits_processor=LogitsProcessorList([TrieMask(trie, len(prompt))]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = []
    for row, score in zip(output.sequences[:, len(prompt) :].tolist(), output.sequences_scores.tolist(), strict=True):
        found.append((row[: row.index(trie.eos_token) + 1], score))
    return found


def token_logprobs(model: Any, trie: Trie, prompt: list[int]) -> dict[int, np.ndarray]:
    """Log-probabilities over the vocabulary at every node, by one forward pass over all titles."""
    titles = [trie.title_tokens(item_class)[:-1] for item_class in range(trie.num_classes)]
    longest = max(map(len, titles))
    ids = torch.tensor([prompt + title + [0] * (longest - len(title)) for title in titles])
    with torch.no_grad():
        logprobs = model(ids).logits[:, len(prompt) - 1 :].float().log_softmax(-1).numpy()
    at: dict[int, np.ndarray] = {}
    for row, title in enumerate(titles):
        node = 0
        for depth, token in enumerate([*title, None]):
            at[node] = logprobs[row, depth]
            node = trie.step(node, token) if token is not None else 0
    return at


def test_equals_hugging_face_generate(engine: Any, model: Any, trie: Trie) -> None:
    prompts = ragged_prompts(64)[:10]
    for prompt, group in zip(prompts, generate(engine, prompts, 8), strict=True):
        expected = hugging_face_beams(model, trie, prompt, 8)
        assert [tokens.tolist() for tokens in group.tokens] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose(group.score, [score for _, score in expected], atol=1e-4)


@pytest.fixture(scope="session")
def node_logprobs(model: Any, trie: Trie) -> list[dict[int, np.ndarray]]:
    """token_logprobs of all 64 prompts."""
    return [token_logprobs(model, trie, prompt) for prompt in ragged_prompts(64)]


@pytest.mark.parametrize("beams", [1, 16, 128])
def test_64_ragged_groups_equal_the_plain_search(
    engine: Any, node_logprobs: list[dict[int, np.ndarray]], trie: Trie, beams: int
) -> None:
    for at, group in zip(node_logprobs, generate(engine, ragged_prompts(64), beams), strict=True):
        expected = plain_beam_search(trie, at.__getitem__, beams)
        assert group.item_class.tolist() == [item_class for _, item_class, _ in expected]
        np.testing.assert_allclose(group.score, [score for score, *_ in expected], atol=1e-4)
        for item_class, tokens, logprobs in zip(group.item_class, group.tokens, group.logprobs, strict=True):
            assert tokens.tolist() == trie.title_tokens(int(item_class))
            assert len(logprobs) == len(tokens)


def test_token_logprobs_are_the_models_own(engine: Any, model: Any) -> None:
    prompts = ragged_prompts(64)[:8]
    for prompt, group in zip(prompts, generate(engine, prompts, 8), strict=True):
        for tokens, logprobs in zip(group.tokens, group.logprobs, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens.tolist()])).logits[0, len(prompt) - 1 : -1]
            own = logits.log_softmax(-1).gather(1, torch.tensor(tokens.tolist())[:, None])[:, 0]
            np.testing.assert_allclose(logprobs, own, rtol=2e-6, atol=1e-5)


def worker_of(engine: Any) -> Any:
    return engine._llm.llm_engine.model_executor.driver_worker.worker


def paged_model(engine: Any) -> PagedModel:
    return worker_of(engine).paged_model


@pytest.mark.parametrize(("setting", "value"), [("max_batched_tokens", 48), ("num_blocks", 150)])
def test_chunks_and_batches_change_nothing(
    engine: Any, monkeypatch: pytest.MonkeyPatch, setting: str, value: int
) -> None:
    prompts = ragged_prompts(24)
    whole = generate(engine, prompts, 16)
    monkeypatch.setattr(paged_model(engine), setting, value)
    for one, other in zip(whole, generate(engine, prompts, 16), strict=True):
        assert one.item_class.tolist() == other.item_class.tolist()
        np.testing.assert_allclose(one.score, other.score, atol=1e-4)


@pytest.mark.parametrize("destination", [[5, 6, 7], [9, 5, 7]])
def test_blocks_are_copied_wherever_they_go(engine: Any, destination: list[int]) -> None:
    source, caches = [7, 1, 5], paged_model(engine)._runner.kv_caches
    for cache in caches:
        cache.normal_()
    expected = [cache[source] for cache in caches]
    paged_model(engine).copy_blocks(np.array(source), np.array(destination))
    for cache, blocks in zip(caches, expected, strict=True):
        assert torch.equal(cache[destination], blocks)


def test_passes_padded_to_a_captured_size_change_nothing(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where CUDA graphs of fixed sizes are replayed: tokens beyond the batch are what an earlier pass left."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor

    sizes: list[tuple[int, int]] = []

    def dispatch(tokens: int, **_: Any) -> tuple[CUDAGraphMode, BatchDescriptor]:
        sizes.append((tokens, min(-(-tokens // 64) * 64, 1024)))
        return CUDAGraphMode.PIECEWISE, BatchDescriptor(sizes[-1][1])

    prompts = ragged_prompts(64)
    expected = generate(engine, prompts, 16)
    monkeypatch.setattr(paged_model(engine)._runner.cudagraph_dispatcher, "dispatch", dispatch)
    for one, other in zip(generate(engine, prompts, 16), expected, strict=True):
        assert one.item_class.tolist() == other.item_class.tolist()
        np.testing.assert_allclose(one.score, other.score, atol=1e-4)
    assert any(tokens < padded for tokens, padded in sizes)


def test_scoring_forced_chains_at_once_changes_nothing(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ragged_prompts(24)
    at_once = generate(engine, prompts, 16)
    monkeypatch.setattr(worker_of(engine).rollout_config, "forced_chains", "token_by_token")
    for one, other in zip(at_once, generate(engine, prompts, 16), strict=True):
        assert one.item_class.tolist() == other.item_class.tolist()
        np.testing.assert_allclose(one.score, other.score, atol=1e-4)


def test_unconstrained_samples_are_the_models_own(
    engine: Any, model: Any, trie: Trie, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_of(engine).rollout_config, "max_completion_tokens", 9)
    prompts, seeds = ragged_prompts(12), list(range(12))
    groups = engine.generate(prompts, seeds, [0] * 12, group_size=6, strategy="unconstrained")
    (alone,) = engine.generate(prompts[5:6], seeds[5:6], [0], group_size=6, strategy="unconstrained")
    assert [tokens.tolist() for tokens in alone.tokens] == [tokens.tolist() for tokens in groups[5].tokens]
    for prompt, group in zip(prompts, groups, strict=True):
        assert len({tuple(tokens.tolist()) for tokens in group.tokens}) > 1
        assert (np.diff(group.score) <= 0).all()
        for tokens, logprobs, item_class in zip(group.tokens, group.logprobs, group.item_class, strict=True):
            assert len(tokens) == 9 or tokens[-1] == trie.eos_token
            assert item_class == trie.classify(tokens.tolist())
            ids = torch.tensor([prompt + tokens.tolist()])
            with torch.no_grad():
                own = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
            np.testing.assert_allclose(logprobs, own[:, 0].numpy(), atol=5e-5)


def test_two_tensor_parallel_ranks_find_the_same_and_hold_all_weights(
    engine: Any, tiny_model_dir: Path, trie_path: Path, tmp_path: Path
) -> None:
    """Two worker processes in lockstep; their shards' checksums add up to that of the whole weights."""
    prompts, files = ragged_prompts(12), [str(tmp_path / name) for name in ("prompts.json", "groups.json")]
    Path(files[0]).write_text(json.dumps(prompts))
    script = Path(__file__).with_name("generate_groups.py")
    command = [sys.executable, str(script), str(tiny_model_dir), str(trie_path), "2", *files]
    run = subprocess.run(command, cwd=script.parent.parent, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    answer = json.loads(Path(files[1]).read_text())
    assert answer["loaded"] == answer["sent"]
    for found, expected in zip(answer["groups"], generate(engine, prompts, 8), strict=True):
        assert found["item_class"] == expected.item_class.tolist()
        np.testing.assert_allclose(found["score"], expected.score, atol=1e-4)


@pytest.mark.parametrize("strategy", ["sample", "dynamic", "stochastic_beam"])
def test_sampling_depends_on_the_seed_alone(
    engine: Any, model: Any, trie: Trie, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, seeds = ragged_prompts(12), list(range(12))
    groups = engine.generate(prompts, seeds, [3] * 12, group_size=8, strategy=strategy)
    for i in (0, 5, 11):
        (alone,) = engine.generate([prompts[i]], [seeds[i]], [3], group_size=8, strategy=strategy)
        assert alone.item_class.tolist() == groups[i].item_class.tolist()
        np.testing.assert_allclose(alone.score, groups[i].score, atol=1e-4)
    for prompt, group in zip(prompts, groups, strict=True):
        assert (np.diff(group.score) <= 0).all()
        assert strategy == "sample" or len(set(group.item_class.tolist())) == len(group.item_class)
        at = token_logprobs(model, trie, prompt)
        for item_class, tokens, logprobs in zip(group.item_class, group.tokens, group.logprobs, strict=True):
            assert tokens.tolist() == trie.title_tokens(int(item_class))
            node, expected = 0, []
            for token in tokens.tolist():
                expected.append(at[node][token])
                node = trie.step(node, token) or 0
            np.testing.assert_allclose(logprobs, expected, rtol=2e-6, atol=2e-5)
    monkeypatch.setattr(engine._config, "temperature", 0.0)
    with pytest.raises(EngineError, match=r"rollout\.temperature=0\.0: a sample needs a temperature above 0"):
        engine.generate(prompts, seeds, [3] * 12, group_size=8, strategy=strategy)
    monkeypatch.undo()
    other = engine.generate(prompts, [seed + 99 for seed in seeds], [3] * 12, group_size=8, strategy=strategy)
    assert [g.item_class.tolist() for g in groups] != [g.item_class.tolist() for g in other]


def test_inclusion_weights_become_a_column(engine: Any) -> None:
    prompts = ragged_prompts(4)
    groups = engine.generate(prompts, [0] * 4, [0] * 4, group_size=8, strategy="stochastic_beam")
    assert all((np.diff(group.score) <= 0).all() for group in groups)
    table = group_table(range(4), 0, prompts, [0] * 4, groups)
    validate_groups(table)
    assert table[INCLUSION_WEIGHT].type == pa.list_(pa.float32())
    assert (
        INCLUSION_WEIGHT not in group_table(range(4), 0, prompts, [0] * 4, generate(engine, prompts, 8)).column_names
    )


def named_weights(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def test_new_weights_are_used_at_once_and_verified(engine: Any, tiny_model_dir: Path, trie: Trie) -> None:
    learner = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    prompts = ragged_prompts(64)[:6]
    before = generate(engine, prompts, 8)
    original = [WeightBucket.pack(named_weights(learner))]
    with torch.no_grad():
        for i, parameter in enumerate(learner.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    buckets = [WeightBucket.pack(named_weights(learner)[start::2]) for start in (0, 1)]
    assert engine.load_weights(buckets) == checksum(named_weights(learner))
    after = generate(engine, prompts, 8)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        expected = plain_beam_search(trie, token_logprobs(learner, trie, prompt).__getitem__, 8)
        assert new.item_class.tolist() == [item_class for _, item_class, _ in expected]
        np.testing.assert_allclose(new.score, [score for score, *_ in expected], atol=1e-4)
        assert not np.allclose(new.score, old.score, atol=1e-2)
    engine.load_weights(original)
    for old, again in zip(before, generate(engine, prompts, 8), strict=True):
        np.testing.assert_array_equal(old.score, again.score)


def test_damaged_weights_show_in_the_checksum(engine: Any, model: Any) -> None:
    bucket = WeightBucket.pack(named_weights(model))
    bucket.data[12_345] ^= 4
    try:
        assert engine.load_weights([bucket]) != checksum(named_weights(model))
    finally:
        assert engine.load_weights([WeightBucket.pack(named_weights(model))]) == checksum(named_weights(model))


def test_missing_and_mistyped_weights_are_errors(engine: Any, model: Any) -> None:
    named = named_weights(model)
    try:
        with pytest.raises(WeightsError, match=r"missing \['model.norm.weight'\]"):
            engine.load_weights([WeightBucket.pack(named[:-1])])
        with pytest.raises(WeightsError, match=r"torch.bfloat16.*rollout.dtype"):
            engine.load_weights([WeightBucket.pack([(name, tensor.bfloat16()) for name, tensor in named])])
    finally:
        engine.load_weights([WeightBucket.pack(named)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is vLLM's sleep mode")
def test_an_engine_that_sleeps_holds_nothing_and_wakes_with_the_next_weights(
    engine: Any, model: Any, monkeypatch: pytest.MonkeyPatch
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
    before = generate(engine, prompts, 8)
    assert all(engine._llm.collective_rpc(held)[0])
    engine.sleep()
    assert not any(engine._llm.collective_rpc(held)[0])
    assert engine.load_weights(weights) == checksum(named_weights(model))
    for old, again in zip(before, generate(engine, prompts, 8), strict=True):
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


def test_bfloat16_differs_only_within_its_rounding(tiny_model_dir: Path, trie_path: Path, trie: Trie) -> None:
    config = RolloutConfig(kv_cache_gib=0.05, dtype="bfloat16", max_batched_tokens=1024)
    engine = create_engine(tiny_model_dir, trie_path, config)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).float().eval()
    prompts = ragged_prompts(64)[::3]
    for prompt, group in zip(prompts, generate(engine, prompts, 16), strict=True):
        exact = plain_beam_search(trie, token_logprobs(reference, trie, prompt).__getitem__, trie.num_classes)
        score = {item_class: value for value, item_class, _ in exact}
        rounding = 0.01 * max(map(abs, score.values()))
        np.testing.assert_allclose(group.score, [score[c] for c in group.item_class.tolist()], atol=rounding)
        assert (np.diff(group.score) <= 0).all()
        assert len(set(group.item_class.tolist())) == 16
    engine.shutdown()


def test_a_prompt_that_cannot_fit_names_the_key_to_raise(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_model(engine), "num_blocks", 20)
    with pytest.raises(EngineError, match=r"prompt of 300 tokens.*rollout.kv_cache_gib by a factor of"):
        generate(engine, [[5] * 300], 64)


def test_internals_name_what_moved() -> None:
    runner = SimpleNamespace(**dict.fromkeys(name for name in RUNNER_NAMES if name != "attn_groups"))
    with pytest.raises(UnsupportedModelError, match=r"SimpleNamespace has no attn_groups.*requests"):
        PagedModel(runner)


@pytest.mark.parametrize(("part", "top"), [("train", 16), ("train_truncated", 16), ("eval50", 50)])
def test_golden_beams(golden_dir: Path, tmp_path: Path, part: str, top: int, golden_engine: Any) -> None:
    import json

    groups = json.loads((golden_dir / "beams.json").read_text())[part]
    limit = 512 if part == "train_truncated" else None
    prompts = [group["prompt_token_ids"][-limit:] if limit else group["prompt_token_ids"] for group in groups]
    for group, found in zip(groups, generate(golden_engine, prompts, top), strict=True):
        assert [tokens.tolist() for tokens in found.tokens] == [beam["token_ids"] for beam in group["sequences"]]
        np.testing.assert_allclose(found.score, [beam["score"] for beam in group["sequences"]], atol=1e-4)


@pytest.fixture(scope="session")
def golden_engine(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(golden_dir / "model")
    marker = tokenizer("### Response:\n").input_ids
    texts = [
        f'### Response:\n"{title}"\n' for title in pq.read_table(golden_dir / "items.parquet")["title"].to_pylist()
    ]
    titles = [[*tokenizer(text).input_ids[len(marker) :], tokenizer.eos_token_id] for text in texts]
    path = tmp_path_factory.mktemp("golden") / "trie.arrow"
    Trie.from_titles(titles, eos_token=tokenizer.eos_token_id, tokenizer_fingerprint="none").save(path)
    engine = create_engine(golden_dir / "model", path, RolloutConfig(kv_cache_gib=0.05))
    yield engine
    engine.shutdown()
