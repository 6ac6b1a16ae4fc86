"""In bf16 the requests engine is exact for the scores that the model gave."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_oracle import NODE_LOGPROBS, VOCABULARY, generate, nodes_of, token_logprobs
from search_oracle import plain_beam_search
from transformers import AutoModelForCausalLM

from catalog.trie import Trie
from rollout.group_beam import GroupBeam

BF16_ROUNDING = 0.3
"""Largest difference of a token's log-probability between bf16 forward passes of differently composed batches."""


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
