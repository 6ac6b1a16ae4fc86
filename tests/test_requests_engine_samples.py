"""The requests engine's samples have the policy's probabilities, and nothing from the model's sampling defaults."""

from typing import Any

import numpy as np
import pytest
import torch
from engine_oracle import NODE_LOGPROBS, SEEDS, check_logprobs, generate, nodes_of, renormalised
from scipy.stats import chisquare

from catalog.trie import Trie
from rollout.dynamic import select


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


@pytest.mark.parametrize(("name", "temperature"), [("requests_engine", 1.0), ("trie_space_engine", 2.0)])
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
    requests_engine: Any,
    trie_space_engine: Any,
    trie: Trie,
    prompts: list[list[int]],
    node_logprobs: list[NODE_LOGPROBS],
) -> None:
    check_logprobs(trie, generate(requests_engine, prompts[:6], 4, strategy="sample"), node_logprobs[:6])
    inside = [renormalised(trie, at) for at in node_logprobs[:6]]
    check_logprobs(trie, generate(trie_space_engine, prompts[:6], 4, strategy="sample"), inside)


def test_seeds_count_modulo_two_to_the_64th(requests_engine: Any, prompts: list[list[int]]) -> None:
    large, small = (
        requests_engine.generate(prompts[:1], [seed], [0], group_size=8, strategy="sample")[0]
        for seed in (2**70 + 5, 5)
    )
    assert large.item_class.tolist() == small.item_class.tolist()


def test_samples_depend_on_prompt_and_seed_alone(requests_engine: Any, prompts: list[list[int]]) -> None:
    def classes(order: list[int], shift: int = 0) -> dict[int, list[int]]:
        seeds = [SEEDS[i] + shift for i in order]
        some = [prompts[i] for i in order]
        found = requests_engine.generate(some, seeds, [0] * len(order), group_size=6, strategy="sample")
        return {i: group.item_class.tolist() for i, group in zip(order, found, strict=True)}

    together = classes(list(range(16)))
    assert classes(list(range(16))[::-1]) == together
    assert classes([3]) == {3: together[3]}
    assert classes(list(range(16)), shift=100) != together


def test_candidates_of_samples_are_ordered_by_score(requests_engine: Any, prompts: list[list[int]]) -> None:
    for strategy in ("sample", "dynamic", "unconstrained"):
        for group in generate(requests_engine, prompts[:6], 8, strategy=strategy):
            assert (np.diff(group.score) <= 0).all()


def test_dynamic_selects_from_one_and_a_half_times_the_samples(requests_engine: Any, prompts: list[list[int]]) -> None:
    size, many, some = 6, prompts[:12], SEEDS[:12]
    pools = requests_engine.generate(many, some, [0] * 12, group_size=9, strategy="sample")
    targets = [int(pool.item_class[-1]) for pool in pools]  # the least likely of what was drawn
    groups = requests_engine.generate(many, some, targets, group_size=size, strategy="dynamic")
    for pool, group, target in zip(pools, groups, targets, strict=True):
        kept = group.item_class.tolist()
        assert target in kept
        assert len(kept) == len(set(kept)) == min(size, len(set(pool.item_class.tolist())))
        frequency = np.bincount(pool.item_class)
        fewest = min(frequency[item] for item in kept if item != target) if len(kept) > 1 else 0
        assert all(frequency[item] <= fewest for item in set(pool.item_class.tolist()) - set(kept))
    assert len(select(pools[0].item_class, targets[0], size)) == len(groups[0].item_class)


def test_unconstrained_candidates_have_full_log_probabilities_and_are_classified(
    requests_engine: Any, model: Any, trie: Trie, prompts: list[list[int]]
) -> None:
    groups = generate(requests_engine, prompts[:4], 8, strategy="unconstrained")
    for prompt, group in zip(prompts[:4], groups, strict=True):
        assert len({tuple(tokens.tolist()) for tokens in group.tokens}) > 1  # top_k 1 of the model's defaults
        for tokens, logprobs, item_class in zip(group.tokens, group.logprobs, group.item_class, strict=True):
            assert len(tokens) == 12 or tokens[-1] == trie.eos_token
            assert item_class == trie.classify(tokens.tolist())
            ids = torch.tensor([prompt + tokens.tolist()])
            with torch.no_grad():
                own = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
            np.testing.assert_allclose(logprobs, own[:, 0].numpy(), atol=5e-5)
