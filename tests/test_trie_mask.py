"""The trie mask against a walk of the trie in plain Python."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from search_oracle import random_trie
from trie_walk import TRIE, VOCABULARY, masked, walk

from catalog.trie import Trie
from rollout.config import LogprobSpace
from rollout.device_trie import DeviceTrie
from rollout.trie_mask import ENDED, LEFT, Sampling, TrieMask, TrieRequest


def mask_of(trie: Trie, space: LogprobSpace = "vocabulary") -> TrieMask:
    return TrieMask(DeviceTrie.of(trie), space)


@given(seed=st.integers(0, 50), count=st.integers(1, 80), vocabulary=st.integers(3, 60))
@settings(max_examples=60, deadline=None)
def test_step_is_the_walk(seed: int, count: int, vocabulary: int) -> None:
    trie = random_trie(seed, count, vocabulary, 7)
    nodes, tokens = (grid.ravel() for grid in np.meshgrid(np.arange(-2, trie.num_nodes), np.arange(vocabulary + 2)))
    found = mask_of(trie).step(torch.from_numpy(nodes), torch.from_numpy(tokens)).tolist()
    for node, token, target in zip(nodes.tolist(), tokens.tolist(), found, strict=True):
        after = node if node < 0 else walk(trie, node, [token])
        assert target == (LEFT if after is None else after)


@pytest.mark.parametrize("space", ["vocabulary", "trie"])
def test_constrain_leaves_the_log_probabilities_of_the_children(space: LogprobSpace) -> None:
    nodes = torch.cat([torch.arange(TRIE.num_nodes), torch.tensor([ENDED, ENDED])])
    logits = torch.randn(len(nodes) + 3, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 4
    rows = torch.randperm(len(nodes) + 3, generator=torch.Generator().manual_seed(1))[: len(nodes)]
    before = logits.clone()
    mask_of(TRIE, space).constrain_(logits, rows, nodes)
    untouched = sorted(set(range(len(logits))) - set(rows.tolist()))
    torch.testing.assert_close(logits[untouched], before[untouched])
    for row, node in zip(rows.tolist(), nodes.tolist(), strict=True):
        torch.testing.assert_close(logits[row], masked(TRIE, node, before[row], space), atol=1e-5, rtol=1e-5)


def test_in_trie_space_a_forced_token_costs_nothing() -> None:
    node = int(np.flatnonzero(np.diff(TRIE.first_edge) == 1)[0])
    logits = torch.randn(1, VOCABULARY)
    mask_of(TRIE, "trie").constrain_(logits, torch.tensor([0]), torch.tensor([node]))
    assert logits.max() == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_samples_have_their_probabilities_at_the_temperature(temperature: float) -> None:
    draws = 4000
    row = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2)) * 2
    requests = [TrieRequest("a", 0, temperature, seed // 8, seed % 8) for seed in range(draws)]
    sampling = Sampling.of(requests, [0] * draws, torch.device("cpu"))
    mask, every = mask_of(TRIE), torch.arange(draws)
    constrained, free = row.repeat(draws, 1), row.repeat(draws, 1)
    mask.constrain_(constrained, every, torch.zeros(draws, dtype=torch.int64), sampling)
    mask.normalise_(free, every, sampling)
    allowed = masked(TRIE, 0, row, "vocabulary")
    for logits, logprobs in ((constrained, allowed), (free, row.log_softmax(0))):
        assert (torch.isfinite(logits).sum(1) == 1).all()
        torch.testing.assert_close(logits.max(1).values, logprobs[logits.argmax(1)])
        expected = (logprobs / temperature).softmax(0).numpy() * draws
        drawn = np.bincount(logits.argmax(1).numpy(), minlength=VOCABULARY)
        often = expected >= 5
        assert drawn[expected == 0].sum() == 0
        statistic = ((drawn[often] - expected[often]) ** 2 / expected[often]).sum()
        assert chi2.sf(statistic, often.sum() - 1) > 1e-3


@pytest.mark.parametrize("temperature", [5e-324, 1e-310])
def test_at_the_lowest_temperatures_the_likeliest_is_drawn(temperature: float) -> None:
    row = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2)) * 2
    requests = [TrieRequest("a", 0, temperature, seed) for seed in range(8)]
    sampling, every = Sampling.of(requests, [0] * 8, torch.device("cpu")), torch.arange(8)
    constrained, free = row.repeat(8, 1), row.repeat(8, 1)
    mask_of(TRIE).constrain_(constrained, every, torch.zeros(8, dtype=torch.int64), sampling)
    mask_of(TRIE).normalise_(free, every, sampling)
    assert constrained.argmax(1).tolist() == [int(masked(TRIE, 0, row, "vocabulary").argmax())] * 8
    assert free.argmax(1).tolist() == [int(row.argmax())] * 8


def test_a_request_that_does_not_say_where_it_stands_is_refused() -> None:
    assert TrieRequest.of(TrieRequest("a", 3).extra_args()) == TrieRequest("a", 3)
    assert TrieRequest.of(TrieRequest("a", None).extra_args()).node is None
    for wrong in (None, {}, {"trie_node": -1}, {"trie_node": "0"}):
        with pytest.raises(ValueError, match="must hold trie_node"):
            TrieRequest.of(wrong)
