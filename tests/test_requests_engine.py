"""The requests engine: exact search, honest samples, nothing from the model's sampling defaults."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from scipy.stats import chisquare
from search_oracle import plain_beam_search
from test_worker_engine import VOCABULARY, ragged_prompts, token_logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer

from catalog.build import build_catalog
from catalog.catalog import Catalog
from catalog.config import DataConfig, GeneratedConfig
from catalog.trie import Trie
from rollout.actor import RolloutWorker, group_seed
from rollout.children import logsumexp
from rollout.config import RolloutConfig, Strategy
from rollout.dynamic import select
from rollout.engines import create_engine
from rollout.group_beam import GroupBeam
from rollout.groups import INCLUSION_WEIGHT, Candidates
from rollout.streams import PublishedWeights, collect, stream_rollout
from rollout.vllm_arguments import EngineError
from rollout.vllm_one_token import _logits
from rollout.vllm_requests import widest_fanout_below
from rollout.weights import WeightBucket, checksum

NODE_LOGPROBS = dict[int, np.ndarray]
SEEDS = list(range(64))
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
BF16_ROUNDING = 0.3
"""Largest difference of a token's log-probability between bf16 forward passes of differently composed batches."""


@pytest.fixture(scope="session")
def trie(tiny_tokenizer_dir: Path) -> Trie:
    """Titles with shared beginnings, forced chains, and titles that are beginnings of others."""
    from search_oracle import random_titles

    eos = int(AutoTokenizer.from_pretrained(tiny_tokenizer_dir).eos_token_id)
    used = [token for token in range(1, VOCABULARY) if token != eos]
    titles = [[*(used[token] for token in title[:-1]), eos] for title in random_titles(1, 60, 40, 12)]
    return Trie.from_titles(titles, eos_token=eos, tokenizer_fingerprint="none")


@pytest.fixture(scope="session")
def trie_path(trie: Trie, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trie") / "trie.arrow"
    trie.save(path)
    return path


@pytest.fixture(scope="session")
def opinionated_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with sampling defaults that would ruin every search and every sample."""
    path = tmp_path_factory.mktemp("opinionated") / "model"
    shutil.copytree(tiny_model_dir, path)
    defaults = {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "repetition_penalty": 5.0}
    (path / "generation_config.json").write_text(json.dumps(defaults))
    return path


# Engines live until the session ends: vLLM's shutdown takes the process groups of all engines of a process with it.


def engine_of(model_dir: Path, trie_path: Path, **changes: Any) -> Any:
    config = RolloutConfig(engine="requests", kv_cache_gib=0.05, max_batched_tokens=1024, **changes)
    return create_engine(model_dir, trie_path, config)


@pytest.fixture(scope="session")
def engine(opinionated_model_dir: Path, trie_path: Path) -> Iterator[Any]:
    engine = engine_of(opinionated_model_dir, trie_path, max_completion_tokens=12)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def trie_space_engine(opinionated_model_dir: Path, trie_path: Path) -> Iterator[Any]:
    """Log-probabilities renormalised over the trie, samples at temperature 2."""
    engine = engine_of(opinionated_model_dir, trie_path, logprob_space="trie", temperature=2.0)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def bf16_engine(tiny_model_dir: Path, trie_path: Path) -> Iterator[Any]:
    engine = engine_of(tiny_model_dir, trie_path, dtype="bfloat16")
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def model(tiny_model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return ragged_prompts(64)


@pytest.fixture(scope="session")
def node_logprobs(model: Any, trie: Trie, prompts: list[list[int]]) -> list[NODE_LOGPROBS]:
    return [token_logprobs(model, trie, prompt) for prompt in prompts]


def generate(engine: Any, prompts: list[list[int]], size: int, **options: Any) -> list[Candidates]:
    return engine.generate(prompts, SEEDS[: len(prompts)], [0] * len(prompts), group_size=size, **options)


def nodes_of(trie: Trie, tokens: np.ndarray) -> list[int]:
    """The node at which each token is generated."""
    nodes = [0]
    for token in tokens[:-1].tolist():
        node = trie.step(nodes[-1], token)
        assert node is not None
        nodes.append(node)
    return nodes


def renormalised(trie: Trie, at: NODE_LOGPROBS) -> NODE_LOGPROBS:
    """Log-probabilities over the allowed tokens of each node."""
    found = {}
    for node, logprobs in at.items():
        children = logprobs[trie.children(node)[0]].astype(np.float64)
        found[node] = (logprobs - np.logaddexp.reduce(children)).astype(np.float32)
    return found


def check_logprobs(trie: Trie, groups: list[Candidates], node_logprobs: list[NODE_LOGPROBS]) -> None:
    """Every token's log-probability is the model's own, and scores are their sums."""
    for at, group in zip(node_logprobs, groups, strict=True):
        for tokens, logprobs, score in zip(group.tokens, group.logprobs, group.score, strict=True):
            own = [at[node][token] for node, token in zip(nodes_of(trie, tokens), tokens.tolist(), strict=True)]
            np.testing.assert_allclose(logprobs, own, atol=2e-5)
            np.testing.assert_allclose(score, sum(own), atol=2e-4)


@pytest.mark.parametrize("beams", [1, 2, 16, 128])
def test_64_ragged_groups_equal_the_plain_search(
    engine: Any, trie: Trie, prompts: list[list[int]], node_logprobs: list[NODE_LOGPROBS], beams: int
) -> None:
    groups = generate(engine, prompts, beams)
    for at, group in zip(node_logprobs, groups, strict=True):
        expected = plain_beam_search(trie, at.__getitem__, beams)
        assert group.item_class.tolist() == [item_class for _, item_class, _ in expected]
        assert [tokens.tolist() for tokens in group.tokens] == [tokens for *_, tokens in expected]
    check_logprobs(trie, groups, node_logprobs)


def test_64_groups_in_trie_space_equal_the_plain_search(
    trie_space_engine: Any, trie: Trie, prompts: list[list[int]], node_logprobs: list[NODE_LOGPROBS]
) -> None:
    inside = [renormalised(trie, at) for at in node_logprobs]
    groups = generate(trie_space_engine, prompts, 8)
    for at, group in zip(inside, groups, strict=True):
        assert group.item_class.tolist() == [title for _, title, _ in plain_beam_search(trie, at.__getitem__, 8)]
    check_logprobs(trie, groups, inside)


def narrowest_decision(trie: Trie, at: NODE_LOGPROBS, beams: int) -> float:
    """The smallest gap between neighbouring candidates that beam search orders, over all its steps."""
    running, pool, narrowest = [(0.0, 0)], [], np.inf
    while running and not (len(pool) == beams and running[0][0] <= pool[-1]):
        found = [
            (score + float(at[node][token]), int(target))
            for score, node in running
            for token, target in zip(*trie.children(node), strict=True)
        ]
        found.sort(key=lambda candidate: -candidate[0])
        found = found[: 2 * beams + 1]
        scores = [score for score, _ in found] + pool
        narrowest = min([narrowest, *(-np.diff(sorted(scores, reverse=True)))])
        pool = sorted(pool + [score for score, target in found[:beams] if target < 0], reverse=True)[:beams]
        running = [candidate for candidate in found[: 2 * beams] if candidate[1] >= 0][:beams]
    return float(narrowest)


def test_in_bf16_the_search_is_exact_for_the_scores_that_the_model_gave(
    bf16_engine: Any, trie: Trie, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rounding: a plain search over the very scores that vLLM returned finds the same, all 64 times."""
    searches: dict[GroupBeam, NODE_LOGPROBS] = {}
    score = GroupBeam.score

    def record(search: GroupBeam, node: int, logprobs: dict[int, float]) -> None:
        row = np.full(VOCABULARY + 200, -np.inf, np.float32)
        row[list(logprobs)] = list(logprobs.values())
        searches.setdefault(search, {})[node] = row
        score(search, node, logprobs)

    monkeypatch.setattr(GroupBeam, "score", record)
    groups = generate(bf16_engine, prompts, 16)
    assert len(searches) == 64
    by_class = {search.result().item_class.tobytes(): at for search, at in searches.items()}
    for group in groups:
        expected = plain_beam_search(trie, by_class[group.item_class.tobytes()].__getitem__, 16)
        assert group.item_class.tolist() == [title for _, title, _ in expected]


def test_in_bf16_wide_decisions_fall_as_in_hugging_face(
    bf16_engine: Any, tiny_model_dir: Path, trie: Trie, prompts: list[list[int]]
) -> None:
    """The documented rule: equal wherever no decision is closer than the rounding of bf16."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).eval()
    decided = 0
    for prompt, group in zip(prompts, generate(bf16_engine, prompts, 1), strict=True):
        at = token_logprobs(model, trie, prompt)
        own = [at[node][token] for node, token in zip(nodes_of(trie, group.tokens[0]), group.tokens[0], strict=True)]
        assert np.abs(group.logprobs[0] - own).max() < BF16_ROUNDING
        if narrowest_decision(trie, at, 1) > BF16_ROUNDING:
            decided += 1
            assert group.item_class.tolist() == [title for _, title, _ in plain_beam_search(trie, at.__getitem__, 1)]
    assert decided >= 8


def class_probabilities(trie: Trie, at: NODE_LOGPROBS, temperature: float) -> np.ndarray:
    """Exact probability of each title under constrained sampling: at every node, among its children."""
    probabilities = np.zeros(trie.num_classes)
    for item_class in range(trie.num_classes):
        tokens = np.asarray(trie.title_tokens(item_class))
        logprob = 0.0
        for node, token in zip(nodes_of(trie, tokens), tokens.tolist(), strict=True):
            children = at[node][trie.children(node)[0]].astype(np.float64) / temperature
            logprob += float(at[node][token]) / temperature - np.logaddexp.reduce(children)
        probabilities[item_class] = np.exp(logprob)
    np.testing.assert_allclose(probabilities.sum(), 1, atol=1e-5)
    return probabilities


@pytest.mark.parametrize(("name", "temperature"), [("engine", 1.0), ("trie_space_engine", 2.0)])
def test_samples_have_the_probabilities_of_the_constrained_policy(
    request: pytest.FixtureRequest,
    trie: Trie,
    prompts: list[list[int]],
    node_logprobs: list[NODE_LOGPROBS],
    name: str,
    temperature: float,
) -> None:
    draws = 1500
    group = generate(request.getfixturevalue(name), prompts[:1], draws, strategy="sample")[0]
    expected = class_probabilities(trie, node_logprobs[0], temperature) * draws
    drawn = np.bincount(group.item_class, minlength=trie.num_classes)
    often = expected >= 5
    pooled_drawn, pooled_expected = [*drawn[often], drawn[~often].sum()], [*expected[often], expected[~often].sum()]
    assert chisquare(pooled_drawn, pooled_expected).pvalue > 1e-3


def test_sampled_log_probabilities_are_those_of_the_policy_at_temperature_1(
    engine: Any, trie_space_engine: Any, trie: Trie, prompts: list[list[int]], node_logprobs: list[NODE_LOGPROBS]
) -> None:
    check_logprobs(trie, generate(engine, prompts[:8], 8, strategy="sample"), node_logprobs[:8])
    inside = [renormalised(trie, at) for at in node_logprobs[:8]]
    check_logprobs(trie, generate(trie_space_engine, prompts[:8], 8, strategy="sample"), inside)


def test_samples_depend_on_prompt_and_seed_alone(engine: Any, prompts: list[list[int]]) -> None:
    def classes(order: list[int], shift: int = 0) -> dict[int, list[int]]:
        seeds = [SEEDS[i] + shift for i in order]
        found = engine.generate([prompts[i] for i in order], seeds, [0] * len(order), group_size=6, strategy="sample")
        return {i: group.item_class.tolist() for i, group in zip(order, found, strict=True)}

    together = classes(list(range(16)))
    assert classes(list(range(16))[::-1]) == together
    assert classes([3]) == {3: together[3]}
    assert classes(list(range(16)), shift=100) != together


def test_candidates_of_samples_are_ordered_by_score(engine: Any, prompts: list[list[int]]) -> None:
    for strategy in ("sample", "dynamic", "unconstrained"):
        for group in generate(engine, prompts[:6], 8, strategy=strategy):
            assert (np.diff(group.score) <= 0).all()


def test_dynamic_selects_from_one_and_a_half_times_the_samples(engine: Any, prompts: list[list[int]]) -> None:
    size, many, some = 6, prompts[:12], SEEDS[:12]
    pools = engine.generate(many, some, [0] * 12, group_size=9, strategy="sample")
    targets = [int(pool.item_class[-1]) for pool in pools]  # the least likely of what was drawn
    groups = engine.generate(many, some, targets, group_size=size, strategy="dynamic")
    for pool, group, target in zip(pools, groups, targets, strict=True):
        kept = group.item_class.tolist()
        assert target in kept
        assert len(kept) == len(set(kept)) == min(size, len(set(pool.item_class.tolist())))
        frequency = np.bincount(pool.item_class)
        fewest = min(frequency[item] for item in kept if item != target) if len(kept) > 1 else 0
        assert all(frequency[item] <= fewest for item in set(pool.item_class.tolist()) - set(kept))
    assert len(select(pools[0].item_class, targets[0], size)) == len(groups[0].item_class)


def test_unconstrained_candidates_have_full_log_probabilities_and_are_classified(
    engine: Any, model: Any, trie: Trie, prompts: list[list[int]]
) -> None:
    groups = generate(engine, prompts[:4], 8, strategy="unconstrained")
    for prompt, group in zip(prompts[:4], groups, strict=True):
        assert len({tuple(tokens.tolist()) for tokens in group.tokens}) > 1  # top_k 1 of the model's defaults
        for tokens, logprobs, item_class in zip(group.tokens, group.logprobs, group.item_class, strict=True):
            assert len(tokens) == 12 or tokens[-1] == trie.eos_token
            assert item_class == trie.classify(tokens.tolist())
            ids = torch.tensor([prompt + tokens.tolist()])
            with torch.no_grad():
                own = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
            np.testing.assert_allclose(logprobs, own[:, 0].numpy(), atol=5e-5)


def test_new_weights_change_the_groups(engine: Any, model: Any, trie: Trie, prompts: list[list[int]]) -> None:
    def load(policy: Any) -> None:
        tensors = list(policy.named_parameters())
        assert engine.load_weights([WeightBucket.pack(tensors)]) == checksum(tensors)

    before = generate(engine, prompts[:8], 4)
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    load(other)
    groups = generate(engine, prompts[:8], 4)
    for prompt, group in zip(prompts[:8], groups, strict=True):
        at = token_logprobs(other, trie, prompt)
        assert group.item_class.tolist() == [title for _, title, _ in plain_beam_search(trie, at.__getitem__, 4)]
    load(model)
    for first, again in zip(before, generate(engine, prompts[:8], 4), strict=True):
        assert again.item_class.tolist() == first.item_class.tolist()


def test_a_forced_token_of_probability_1_leaves_finite_log_probabilities() -> None:
    logits = _logits([{5: 0.0}, {0: -1.0, 3: -0.5}], 8)
    normalised = logits - logsumexp(logits)[:, None]
    np.testing.assert_allclose(normalised[0, 5], 0.0, atol=1e-6)
    np.testing.assert_allclose(normalised[1, [0, 3]], [-1.0, -0.5], atol=1e-6)


def test_what_cannot_be_generated_is_refused(engine: Any, prompts: list[list[int]]) -> None:
    with pytest.raises(EngineError, match="2 prompts came with 1 seeds"):
        engine.generate(prompts[:2], [0], [0, 0])
    with pytest.raises(EngineError, match=r"prompt 0 has token ids from -1 to \d+, the model's vocabulary is"):
        generate(engine, [[-1, *prompts[0]]], 4)
    with pytest.raises(EngineError, match="prompt 1 has no tokens"):
        generate(engine, [prompts[0], []], 4)
    with pytest.raises(EngineError, match=r"prompt 0 has 2040 tokens.*rollout\.vllm\.max_model_len"):
        generate(engine, [[5] * 2040], 4)
    engine._config.temperature, configured = 0.0, engine._config.temperature
    with pytest.raises(EngineError, match=r"rollout\.temperature=0\.0: a sample needs a temperature above 0"):
        generate(engine, prompts[:1], 4, strategy="sample")
    engine._config.temperature = configured


def test_no_prompts_give_no_groups(engine: Any) -> None:
    assert generate(engine, [], 4) == []
    assert generate(engine, [], 4, strategy="sample") == []


def test_widest_fanout_below_is_the_widest_of_the_subtree(trie: Trie) -> None:
    def widest(node: int) -> int:
        targets = trie.children(node)[1].tolist()
        return max([len(targets), *(widest(target) for target in targets if target >= 0)])

    assert widest_fanout_below(trie).tolist() == [widest(node) for node in range(trie.num_nodes)]


@pytest.fixture(scope="session")
def rollout_catalog(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    data = DataConfig(cache=str(tmp_path_factory.mktemp("catalog")), generated=GeneratedConfig(items=200, users=120))
    return build_catalog(data, str(tiny_tokenizer_dir))


def test_a_rollout_worker_with_the_other_engine_streams_the_same_groups(
    ray_session: None, rollout_catalog: Catalog, tiny_model_dir: Path, model: Any
) -> None:
    """Actor, streams, weights and the worker engine together, against the requests engine in this process."""
    ids = list(range(10))
    config = RolloutConfig(group_size=8, groups_per_table=4, kv_cache_gib=0.05, max_completion_tokens=10)
    worker = RolloutWorker.options(num_cpus=0).remote(0, str(tiny_model_dir), str(rollout_catalog.path), config)
    tensors = list(model.named_parameters())
    weights = PublishedWeights(3, [ray.put(WeightBucket.pack([named])) for named in tensors], checksum(tensors))
    assert ray.get(weights.load(worker), timeout=120)["checksum"] == weights.checksum
    engine = engine_of(tiny_model_dir, rollout_catalog.path / "trie.arrow", max_completion_tokens=10)
    seeds = [group_seed(0, 3, i) for i in ids]
    for strategy in STRATEGIES:
        stream = stream_rollout(worker, 0, "train", ids, 3, 0, config, strategy=strategy, weights=weights)
        rows = pa.concat_tables([ray.get(table) for _, table in collect([stream], 120)]).to_pylist()
        assert [row["example_id"] for row in rows] == ids
        prompts, targets = [row["prompt_tokens"] for row in rows], [row["target_class"] for row in rows]
        groups = engine.generate(prompts, seeds, targets, group_size=8, strategy=strategy)
        for row, group in zip(rows, groups, strict=True):
            assert row["candidate_class"] == group.item_class.tolist()
            assert row["candidate_tokens"] == [tokens.tolist() for tokens in group.tokens]
            np.testing.assert_allclose(row["score"], group.score, atol=5e-4)
            if strategy == "stochastic_beam":
                np.testing.assert_allclose(row[INCLUSION_WEIGHT], group.inclusion_weight, rtol=1e-2)
            for theirs, ours in zip(row["candidate_logprobs"], group.logprobs, strict=True):
                np.testing.assert_allclose(theirs, ours, atol=1e-4)
    ray.kill(worker)


@pytest.mark.gpu
@pytest.mark.parametrize("second_runner", ["0", "1"])
def test_both_model_runners_equal_the_plain_search(
    tiny_model_dir: Path,
    trie_path: Path,
    trie: Trie,
    prompts: list[list[int]],
    node_logprobs: list[NODE_LOGPROBS],
    monkeypatch: pytest.MonkeyPatch,
    second_runner: str,
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    import vllm.envs

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", second_runner)
    vllm.envs.disable_envs_cache()  # an engine of this process has frozen what it found
    engine = engine_of(tiny_model_dir, trie_path)
    assert engine._llm.llm_engine.vllm_config.use_v2_model_runner == (second_runner == "1")
    found = generate(engine, prompts, 8)
    engine.shutdown()
    for at, group in zip(node_logprobs, found, strict=True):
        assert group.item_class.tolist() == [title for _, title, _ in plain_beam_search(trie, at.__getitem__, 8)]
