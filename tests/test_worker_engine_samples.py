"""The worker engine's samples: the model's own, a function of the seed, weighted where they must be."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from engine_oracle import generate, ragged_prompts, token_logprobs, worker_of

from catalog.trie import Trie
from rollout.config import Strategy
from rollout.groups import INCLUSION_WEIGHT, group_table, validate_groups
from rollout.vllm_arguments import EngineError


def test_unconstrained_samples_are_the_models_own(
    worker_engine: Any, model: Any, trie: Trie, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_of(worker_engine).rollout_config, "max_completion_tokens", 9)
    prompts, seeds = ragged_prompts(12), list(range(12))
    groups = worker_engine.generate(prompts, seeds, [0] * 12, group_size=6, strategy="unconstrained")
    (alone,) = worker_engine.generate(prompts[5:6], seeds[5:6], [0], group_size=6, strategy="unconstrained")
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


@pytest.mark.parametrize("strategy", ["sample", "dynamic", "stochastic_beam"])
def test_sampling_depends_on_the_seed_alone(
    worker_engine: Any, model: Any, trie: Trie, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, seeds = ragged_prompts(12), list(range(12))
    groups = worker_engine.generate(prompts, seeds, [3] * 12, group_size=8, strategy=strategy)
    for i in (0, 5, 11):
        (alone,) = worker_engine.generate([prompts[i]], [seeds[i]], [3], group_size=8, strategy=strategy)
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
    monkeypatch.setattr(worker_engine._config, "temperature", 0.0)
    with pytest.raises(EngineError, match=r"rollout\.temperature=0\.0: a sample needs a temperature above 0"):
        worker_engine.generate(prompts, seeds, [3] * 12, group_size=8, strategy=strategy)
    monkeypatch.undo()
    other = worker_engine.generate(prompts, [seed + 99 for seed in seeds], [3] * 12, group_size=8, strategy=strategy)
    assert [g.item_class.tolist() for g in groups] != [g.item_class.tolist() for g in other]


def test_inclusion_weights_become_a_column(worker_engine: Any) -> None:
    prompts = ragged_prompts(4)
    groups = worker_engine.generate(prompts, [0] * 4, [0] * 4, group_size=8, strategy="stochastic_beam")
    assert all((np.diff(group.score) <= 0).all() for group in groups)
    table = group_table(range(4), 0, prompts, [0] * 4, groups)
    validate_groups(table)
    assert table[INCLUSION_WEIGHT].type == pa.list_(pa.float32())
    by_beam_search = group_table(range(4), 0, prompts, [0] * 4, generate(worker_engine, prompts, 8))
    assert INCLUSION_WEIGHT not in by_beam_search.column_names
