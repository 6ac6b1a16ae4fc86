"""The requests engine: exact search, new weights, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_fixtures import engine_of
from engine_oracle import NODE_LOGPROBS, check_logprobs, generate, renormalised, token_logprobs
from search_oracle import plain_beam_search
from transformers import AutoModelForCausalLM

from catalog.trie import Trie
from rollout.logsumexp import logsumexp
from rollout.vllm_arguments import EngineError
from rollout.vllm_one_token import _logits
from rollout.vllm_requests import widest_fanout_below
from rollout.weights import WeightBucket, checksum


@pytest.mark.parametrize("beams", [1, 2, 16, 128])
def test_64_ragged_groups_equal_the_plain_search(
    requests_engine: Any, trie: Trie, prompts: list[list[int]], node_logprobs: list[NODE_LOGPROBS], beams: int
) -> None:
    groups = generate(requests_engine, prompts, beams)
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


def test_new_weights_change_the_groups(requests_engine: Any, model: Any, trie: Trie, prompts: list[list[int]]) -> None:
    def load(policy: Any) -> None:
        tensors = list(policy.named_parameters())
        assert requests_engine.load_weights([WeightBucket.pack(tensors)]) == checksum(tensors)

    before = generate(requests_engine, prompts[:4], 4)
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    load(other)
    groups = generate(requests_engine, prompts[:4], 4)
    for prompt, group in zip(prompts[:4], groups, strict=True):
        at = token_logprobs(other, trie, prompt)
        assert group.item_class.tolist() == [title for _, title, _ in plain_beam_search(trie, at.__getitem__, 4)]
    load(model)
    for first, again in zip(before, generate(requests_engine, prompts[:4], 4), strict=True):
        assert again.item_class.tolist() == first.item_class.tolist()


def test_a_forced_token_of_probability_1_leaves_finite_log_probabilities() -> None:
    logits = _logits([{5: 0.0}, {0: -1.0, 3: -0.5}], [np.array([5]), np.array([0, 3])], 8)
    normalised = logits - logsumexp(logits)[:, None]
    np.testing.assert_allclose(normalised[0, 5], 0.0, atol=1e-6)
    np.testing.assert_allclose(normalised[1, [0, 3]], [-1.0, -0.5], atol=1e-6)


@pytest.mark.parametrize("instead", [{0: -np.inf}, {7: -np.inf}], ids=["itself", "another"])
def test_a_child_without_probability_is_not_given_what_other_tokens_have(instead: dict[int, float]) -> None:
    """vLLM answers with the likeliest tokens, among which one of none may stand for another."""
    logits = _logits([{2: -2.0, 3: -1.0} | instead], [np.array([0, 2, 3])], 8)
    normalised = logits - logsumexp(logits)[:, None]
    np.testing.assert_allclose(normalised[0, [0, 2, 3]], [-np.inf, -2.0, -1.0], atol=1e-6)
    np.testing.assert_allclose(normalised.exp().sum(), 1.0, atol=1e-6)


def test_what_cannot_be_generated_is_refused(requests_engine: Any, prompts: list[list[int]]) -> None:
    with pytest.raises(EngineError, match="2 prompts came with 1 seeds"):
        requests_engine.generate(prompts[:2], [0], [0, 0])
    with pytest.raises(EngineError, match=r"prompt 0 has token ids from -1 to \d+, the model's vocabulary is"):
        generate(requests_engine, [[-1, *prompts[0]]], 4)
    with pytest.raises(EngineError, match="prompt 1 has no tokens"):
        generate(requests_engine, [prompts[0], []], 4)
    with pytest.raises(EngineError, match=r"prompt 0 has 2040 tokens.*rollout\.vllm\.max_model_len"):
        generate(requests_engine, [[5] * 2040], 4)
    with pytest.raises(EngineError, match=r"rollout\.strategy=beams: choose one of beam, sample"):
        generate(requests_engine, prompts[:1], 4, strategy="beams")
    with pytest.raises(EngineError, match=r"rollout\.group_size=0: a group needs a candidate"):
        generate(requests_engine, prompts[:1], 0)
    requests_engine._config.temperature, configured = 0.0, requests_engine._config.temperature
    with pytest.raises(EngineError, match=r"rollout\.temperature=0\.0: a sample needs a temperature above 0"):
        generate(requests_engine, prompts[:1], 4, strategy="sample")
    requests_engine._config.temperature = float("inf")
    with pytest.raises(EngineError, match=r"rollout\.temperature=inf: a sample needs .* below infinity"):
        generate(requests_engine, prompts[:1], 4, strategy="sample")
    requests_engine._config.temperature = configured


@pytest.mark.parametrize("broken", ["add_request", "step"])
@pytest.mark.parametrize("strategy", ["beam", "sample", "stochastic_beam"])
def test_a_search_that_breaks_off_leaves_no_requests(
    requests_engine: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, strategy: str, broken: str
) -> None:
    expected = generate(requests_engine, prompts[:4], 4, strategy=strategy)
    vllm_engine = requests_engine._llm.llm_engine
    call, calls = getattr(vllm_engine, broken), iter(range(2))

    def breaks(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return call(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(vllm_engine, broken, breaks)
        with pytest.raises(KeyboardInterrupt):
            generate(requests_engine, prompts[4:8], 4, strategy=strategy)
    again = generate(requests_engine, prompts[:4], 4, strategy=strategy)
    for group, before in zip(again, expected, strict=True):
        assert group.item_class.tolist() == before.item_class.tolist()
        np.testing.assert_allclose(group.score, before.score, atol=1e-4)


def test_no_prompts_give_no_groups(requests_engine: Any) -> None:
    assert generate(requests_engine, [], 4) == []
    assert generate(requests_engine, [], 4, strategy="sample") == []


def test_widest_fanout_below_is_the_widest_of_the_subtree(trie: Trie) -> None:
    def widest(node: int) -> int:
        targets = trie.children(node)[1].tolist()
        return max([len(targets), *(widest(target) for target in targets if target >= 0)])

    assert widest_fanout_below(trie).tolist() == [widest(node) for node in range(trie.num_nodes)]


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
    engine = engine_of(tiny_model_dir, trie_path, engine="requests")
    assert engine._llm.llm_engine.vllm_config.use_v2_model_runner == (second_runner == "1")
    found = generate(engine, prompts, 8)
    engine.shutdown()
    for at, group in zip(node_logprobs, found, strict=True):
        assert group.item_class.tolist() == [title for _, title, _ in plain_beam_search(trie, at.__getitem__, 8)]
