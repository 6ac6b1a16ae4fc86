"""Stochastic beam search draws without replacement, with the right probabilities and weights."""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pytest
import torch
from search_oracle import EOS, class_probabilities, random_trie

from catalog.trie import Trie
from rollout.config import LogprobSpace
from rollout.device_trie import DeviceTrie
from rollout.groups import Candidates
from rollout.noise import gumbel, uniform
from rollout.stochastic import StochasticBeamSearch

DRAWS = 20_000


def draw(
    trie: Trie,
    logits: torch.Tensor,
    seeds: range,
    size: int,
    temperature: float = 1.0,
    space: LogprobSpace = "vocabulary",
) -> list[Candidates]:
    """One group per seed, all with the model logits[node]."""
    search = StochasticBeamSearch(DeviceTrie.of(trie), seeds, size, temperature, space)
    while (frontier := search.frontier()).size:
        search.advance(frontier, search.children(frontier, slice(None), logits[frontier.node]))
    return search.results()


def inclusion_probabilities(p: np.ndarray, size: int) -> np.ndarray:
    """Exact, by enumerating every ordered sample without replacement."""
    included = np.zeros(len(p))
    for order in permutations(range(len(p)), size):
        probability, left = 1.0, 1.0
        for item in order:
            probability *= p[item] / left
            left -= p[item]
        included[list(order)] += probability
    return included


@dataclass
class Drawn:
    """Many groups of 3 of 8 titles, with titles that begin others."""

    groups: list[Candidates]
    p: np.ndarray
    """Of each title in a draw, at the temperature."""
    policy: np.ndarray
    """Of each title under the policy."""


@pytest.fixture(scope="module", params=[1.0, 0.7, 2.0])
def drawn(request: pytest.FixtureRequest) -> Drawn:
    temperature = request.param
    titles = [[1, EOS], [1, 2, EOS], [1, 2, 3, EOS], [4, 5, EOS], [4, 6, EOS], [7, 8, 9, EOS], [7, EOS], [8, EOS]]
    trie = Trie.from_titles(titles, eos_token=EOS, tokenizer_fingerprint="")
    logits = torch.randn(trie.num_nodes, 10, generator=torch.Generator().manual_seed(3))
    groups = draw(trie, logits, range(DRAWS), 3, temperature)
    return Drawn(groups, class_probabilities(trie, logits, temperature), class_probabilities(trie, logits, 1.0))


def test_inclusion_probabilities_equal_brute_force(drawn: Drawn) -> None:
    groups, p = drawn.groups, drawn.p
    counts = np.bincount(np.concatenate([group.item_class for group in groups]), minlength=len(p))
    exact = inclusion_probabilities(p, 3)
    deviation = (counts / DRAWS - exact) / np.sqrt(exact * (1 - exact) / DRAWS)
    assert np.abs(deviation).max() < 4


def test_the_first_is_a_sample_of_the_policy_at_the_temperature(drawn: Drawn) -> None:
    groups, p = drawn.groups, drawn.p
    counts = np.bincount([int(group.item_class[0]) for group in groups], minlength=len(p))
    assert ((counts - DRAWS * p) ** 2 / (DRAWS * p)).sum() < 30  # chi-square, 7 degrees of freedom: 1e-4


def test_weights_make_estimates_of_the_policy_unbiased_at_any_temperature(drawn: Drawn) -> None:
    groups, p = drawn.groups, drawn.policy
    for value in (np.ones(len(p)), np.arange(len(p)) ** 2.0, np.eye(len(p))[int(p.argmin())]):
        estimates = np.array([(group.inclusion_weight * value[group.item_class]).sum() for group in groups])
        error = estimates.std() / np.sqrt(DRAWS)
        assert abs(estimates.mean() - (p * value).sum()) < 4 * error


def test_candidates_are_distinct_and_scored_by_the_policy() -> None:
    trie = random_trie(2, 60, 20, 8)
    logits = torch.randn(trie.num_nodes, 20, generator=torch.Generator().manual_seed(0))
    for group in draw(trie, logits, range(50), 16):
        assert len(set(group.item_class.tolist())) == 16
        for item_class, tokens, logprobs in zip(group.item_class, group.tokens, group.logprobs, strict=True):
            assert tokens.tolist() == trie.title_tokens(int(item_class))
            assert len(logprobs) == len(tokens)
        assert group.score == pytest.approx([logprobs.sum() for logprobs in group.logprobs])


@pytest.mark.parametrize("space", ["vocabulary", "trie"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_sample_of_everything_has_the_policys_probabilities_as_weights(
    temperature: float, space: LogprobSpace
) -> None:
    trie = random_trie(2, 8, 20, 8)
    logits = torch.randn(trie.num_nodes, 20, generator=torch.Generator().manual_seed(0))
    p = class_probabilities(trie, logits, 1.0)
    for group in draw(trie, logits, range(5), trie.num_classes + 3, temperature, space):
        assert sorted(group.item_class.tolist()) == list(range(trie.num_classes))
        np.testing.assert_allclose(group.inclusion_weight, p[group.item_class], rtol=1e-5)


def test_a_group_is_a_function_of_its_seed_alone() -> None:
    trie = random_trie(2, 60, 20, 8)
    logits = torch.randn(trie.num_nodes, 20, generator=torch.Generator().manual_seed(0))
    together = draw(trie, logits, range(10), 4)
    for seed, group in enumerate(together):
        alone = draw(trie, logits, range(seed, seed + 1), 4)[0]
        np.testing.assert_array_equal(alone.item_class, group.item_class)
        np.testing.assert_array_equal(alone.inclusion_weight, group.inclusion_weight)
    assert len({tuple(group.item_class.tolist()) for group in together}) > 5


def test_noise_never_reaches_zero_or_one() -> None:
    no_bit_set, all_bits_set = -8941845932926284220, -3223976110786282492  # what seed 0 and these are hashed to
    counters = torch.tensor([no_bit_set, all_bits_set])
    low, high = uniform(torch.tensor([0]), counters).tolist()
    assert 0 < low < 2.0**-52
    assert 1 - 2.0**-52 < high < 1
    assert torch.isfinite(gumbel(torch.tensor([0]), counters)).all()


def test_noise_is_uniform_and_its_counters_matter() -> None:
    counter = torch.arange(100_000)
    seed = torch.zeros_like(counter)
    numbers = uniform(seed, counter)
    assert torch.histc(numbers, 10, 0, 1).sub(10_000).abs().max() < 500
    for other in (uniform(seed + 1, counter), uniform(seed, counter, seed), uniform(seed, counter + 1)):
        assert abs(float(torch.corrcoef(torch.stack([numbers, other]))[0, 1])) < 0.02
    assert abs(float(gumbel(seed, counter).mean()) - 0.5772) < 0.02
