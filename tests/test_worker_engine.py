"""The worker engine finds what Hugging Face and a plain search find."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_oracle import generate, hugging_face_beams, ragged_prompts, token_logprobs
from search_oracle import plain_beam_search
from transformers import AutoModelForCausalLM, AutoTokenizer

from catalog.trie import Trie
from rollout.config import RolloutConfig
from rollout.engines import create_engine


def test_equals_hugging_face_generate(worker_engine: Any, model: Any, trie: Trie) -> None:
    prompts = ragged_prompts(64)[:10]
    for prompt, group in zip(prompts, generate(worker_engine, prompts, 8), strict=True):
        expected = hugging_face_beams(model, trie, prompt, 8)
        assert [tokens.tolist() for tokens in group.tokens] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose(group.score, [score for _, score in expected], atol=1e-4)


@pytest.mark.parametrize("beams", [1, 16, 128])
def test_64_ragged_groups_equal_the_plain_search(
    worker_engine: Any, node_logprobs: list[dict[int, np.ndarray]], trie: Trie, beams: int
) -> None:
    for at, group in zip(node_logprobs, generate(worker_engine, ragged_prompts(64), beams), strict=True):
        expected = plain_beam_search(trie, at.__getitem__, beams)
        assert group.item_class.tolist() == [item_class for _, item_class, _ in expected]
        np.testing.assert_allclose(group.score, [score for score, *_ in expected], atol=1e-4)
        for item_class, tokens, logprobs in zip(group.item_class, group.tokens, group.logprobs, strict=True):
            assert tokens.tolist() == trie.title_tokens(int(item_class))
            assert len(logprobs) == len(tokens)


def test_token_logprobs_are_the_models_own(worker_engine: Any, model: Any) -> None:
    prompts = ragged_prompts(64)[:8]
    for prompt, group in zip(prompts, generate(worker_engine, prompts, 8), strict=True):
        for tokens, logprobs in zip(group.tokens, group.logprobs, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens.tolist()])).logits[0, len(prompt) - 1 : -1]
            own = logits.log_softmax(-1).gather(1, torch.tensor(tokens.tolist())[:, None])[:, 0]
            np.testing.assert_allclose(logprobs, own, rtol=2e-6, atol=1e-5)


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


@pytest.mark.parametrize(("part", "top"), [("train", 16), ("train_truncated", 16), ("eval50", 50)])
def test_golden_beams(golden_dir: Path, tmp_path: Path, part: str, top: int, golden_engine: Any) -> None:

    groups = json.loads((golden_dir / "beams.json").read_text())[part]
    limit = 512 if part == "train_truncated" else None
    prompts = [group["prompt_token_ids"][-limit:] if limit else group["prompt_token_ids"] for group in groups]
    for group, found in zip(groups, generate(golden_engine, prompts, top), strict=True):
        assert [tokens.tolist() for tokens in found.tokens] == [beam["token_ids"] for beam in group["sequences"]]
        np.testing.assert_allclose(found.score, [beam["score"] for beam in group["sequences"]], atol=1e-4)


@pytest.fixture(scope="session")
def golden_engine(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import pyarrow.parquet as pq

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
