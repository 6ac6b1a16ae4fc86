"""The search equals a plain one, on any trie and whatever is looked ahead."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search_oracle import EOS, plain_beam_search, random_trie

from catalog.trie import Trie
from rollout.children import top_children
from rollout.config import ForcedChains, LogprobSpace
from rollout.device_trie import DeviceTrie
from rollout.frontier import Frontier
from rollout.groups import Candidates
from rollout.logsumexp import logsumexp
from rollout.search import BeamSearch


@dataclass
class Asked:
    """What a search asked of its model."""

    passes: int = 0
    nodes: int = 0


def run(
    trie: Trie,
    logits: torch.Tensor,
    beams: int,
    *,
    forced_chains: ForcedChains = "at_once",
    space: LogprobSpace = "vocabulary",
) -> tuple[list[Candidates], Asked]:
    """Search groups whose model answers logits[group, node]: the candidates, and what it was asked."""
    device_trie = DeviceTrie.of(trie)
    search, asked = BeamSearch(device_trie, len(logits), beams, space, forced_chains), Asked()
    before = None
    while (frontier := search.frontier()).size:
        check_frontier(trie, frontier, before)
        before = frontier
        group = torch.from_numpy(np.repeat(frontier.slot // beams, frontier.count))
        answer = logits[group, frontier.node]
        search.advance(frontier, search.children(frontier, slice(None), answer))
        asked.passes, asked.nodes = asked.passes + 1, asked.nodes + len(frontier.node)
    return search.results(), asked


def check_frontier(trie: Trie, frontier: Frontier, before: Frontier | None) -> None:
    """What the frontier says of its nodes is so; every beam goes on where its parent stood at the frontier before."""
    node, last = frontier.node.numpy(), np.cumsum(frontier.count) - 1
    np.testing.assert_array_equal(frontier.fanout, np.diff(trie.first_edge)[node])
    inner = np.flatnonzero(trie.edge_target >= 0)
    edge_to = np.zeros(trie.num_nodes, np.int64)
    edge_to[trie.edge_target[inner]] = inner
    above = np.searchsorted(trie.first_edge, edge_to, side="right") - 1
    first = node[last - frontier.count + 1]
    if before is None:
        assert not node.any()
        assert np.array_equal(frontier.slot, np.arange(len(frontier.parent)) * frontier.parent.shape[1])
        return
    np.testing.assert_array_equal(frontier.token.numpy(), trie.edge_token[edge_to[node]])
    group = frontier.slot // frontier.parent.shape[1]
    stood = dict(zip(before.slot.tolist(), before.node.numpy()[np.cumsum(before.count) - 1].tolist(), strict=True))
    parents = group * frontier.parent.shape[1] + frontier.parent.ravel()[frontier.slot]
    assert above[first].tolist() == [stood[parent] for parent in parents.tolist()]
    not_first = np.delete(np.arange(len(node)), last - frontier.count + 1)
    np.testing.assert_array_equal(above[node[not_first]], node[not_first - 1])


def logprobs_of(trie: Trie, logits: torch.Tensor, space: LogprobSpace) -> np.ndarray:
    """float32 [nodes, vocabulary] for the plain search."""
    if space == "trie":
        allowed = torch.full_like(logits, -torch.inf)
        for node in range(trie.num_nodes):
            allowed[node, trie.children(node)[0].tolist()] = 0
        logits = logits + allowed
    return logits.log_softmax(-1).numpy()


def assert_equal(found: Candidates, expected: Sequence[tuple[np.float32, int, list[int]]]) -> None:
    assert found.item_class.tolist() == [item_class for _, item_class, _ in expected]
    assert [tokens.tolist() for tokens in found.tokens] == [tokens for *_, tokens in expected]
    np.testing.assert_allclose(found.score, [score for score, *_ in expected], rtol=1e-5, atol=1e-4)
    for logprobs, score in zip(found.logprobs, found.score, strict=True):
        np.testing.assert_allclose(logprobs.sum(), score, rtol=1e-5, atol=1e-4)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    titles=st.integers(1, 60),
    vocabulary=st.sampled_from([3, 6, 30]),
    longest=st.integers(1, 12),
    groups=st.sampled_from([1, 2, 5, 64]),
    beams=st.sampled_from([1, 2, 3, 8, 16, 50, 128]),
    forced_chains=st.sampled_from(["at_once", "token_by_token"]),
    space=st.sampled_from(["vocabulary", "trie"]),
    sharpness=st.sampled_from([0.3, 1.0, 4.0]),
)
def test_search_equals_the_plain_one(
    seed: int,
    titles: int,
    vocabulary: int,
    longest: int,
    groups: int,
    beams: int,
    forced_chains: ForcedChains,
    space: LogprobSpace,
    sharpness: float,
) -> None:
    trie = random_trie(seed, titles, vocabulary, longest)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(groups, trie.num_nodes, vocabulary, generator=generator) * sharpness
    found, _ = run(trie, logits, beams, forced_chains=forced_chains, space=space)
    for group in range(groups):
        logprobs = logprobs_of(trie, logits[group], space)
        assert_equal(found[group], plain_beam_search(trie, logprobs.__getitem__, beams))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), titles=st.integers(1, 40))
def test_width_of_the_catalogue_ranks_it_exhaustively(seed: int, titles: int) -> None:
    trie = random_trie(seed, titles, 20, 8)
    logits = torch.randn(1, trie.num_nodes, 20, generator=torch.Generator().manual_seed(seed))
    logprobs = logprobs_of(trie, logits[0], "vocabulary")
    scores = []
    for item_class in range(trie.num_classes):
        node, score = 0, 0.0
        for token in trie.title_tokens(item_class):
            score += float(logprobs[node, token])
            node = trie.step(node, token) or 0
        scores.append(score)
    found, _ = run(trie, logits, trie.num_classes)
    assert found[0].item_class.tolist() == np.argsort(-np.array(scores)).tolist()


def test_equal_scores_go_to_the_earlier_beam_and_the_lower_token() -> None:
    trie = Trie.from_titles([[a, b, EOS] for a in (1, 2) for b in (1, 2, 3)], eos_token=EOS, tokenizer_fingerprint="")
    found, _ = run(trie, torch.zeros(1, trie.num_nodes, 4), beams=3)
    assert [tokens.tolist() for tokens in found[0].tokens] == [[1, 1, 0], [1, 2, 0], [1, 3, 0]]


@pytest.mark.parametrize("forced_chains", ["at_once", "token_by_token"])
def test_of_equal_scores_the_title_that_ends_first_comes_first(forced_chains: ForcedChains) -> None:
    titles = [[2, 5, 5, EOS], [3, EOS], [5, 1, EOS]]
    trie = Trie.from_titles(titles, eos_token=EOS, tokenizer_fingerprint="")
    logits = torch.zeros(1, trie.num_nodes, 6)
    logits[..., 5] = -2.0
    found, _ = run(trie, logits, beams=2, forced_chains=forced_chains, space="trie")
    assert [tokens.tolist() for tokens in found[0].tokens] == [[3, EOS], [2, 5, 5, EOS]]


def test_of_equal_scores_what_is_in_the_pool_stays_before_what_comes() -> None:
    trie = Trie.from_titles([[2, EOS], [1, 3, EOS]], eos_token=EOS, tokenizer_fingerprint="")
    logits = torch.full((1, trie.num_nodes, 4), -1e9)
    logits[0, 0] = 0.0
    for node in range(1, trie.num_nodes):
        logits[0, node, trie.children(node)[0].tolist()] = 0.0
    found, _ = run(trie, logits, beams=2, forced_chains="token_by_token")
    assert [tokens.tolist() for tokens in found[0].tokens] == [[2, EOS], [1, 3, EOS]]


def test_forced_chains_take_one_pass() -> None:
    titles = [[first, *range(5, 25), EOS] for first in (1, 2, 3)]
    trie = Trie.from_titles(titles, eos_token=EOS, tokenizer_fingerprint="")
    logits = torch.randn(2, trie.num_nodes, 30, generator=torch.Generator().manual_seed(0))
    step_by_step, often = run(trie, logits, beams=3, forced_chains="token_by_token")
    at_once, seldom = run(trie, logits, beams=3)
    assert (often.passes, seldom.passes) == (22, 2)
    for one, other in zip(step_by_step, at_once, strict=True):
        assert one.item_class.tolist() == other.item_class.tolist()
        np.testing.assert_array_equal(one.score, other.score)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    titles=st.integers(1, 60),
    vocabulary=st.sampled_from([6, 30]),
    beams=st.integers(1, 64),
)
def test_only_nodes_that_are_needed_are_scored_ahead(seed: int, titles: int, vocabulary: int, beams: int) -> None:
    trie = random_trie(seed, titles, vocabulary, 12)
    logits = torch.randn(3, trie.num_nodes, vocabulary, generator=torch.Generator().manual_seed(seed))
    _, one_by_one = run(trie, logits, beams, forced_chains="token_by_token")
    _, ahead = run(trie, logits, beams)
    assert ahead.passes <= one_by_one.passes
    assert ahead.nodes >= one_by_one.nodes
    if beams >= trie.num_classes:  # else a full pool may end a beam before all of its nodes are needed
        assert ahead.nodes == one_by_one.nodes


def test_forced_tokens_cost_nothing_when_renormalised_over_the_trie() -> None:
    titles = [[first, *range(5, 25), EOS] for first in (1, 2, 3)]
    trie = Trie.from_titles(titles, eos_token=EOS, tokenizer_fingerprint="")
    logits = torch.randn(2, trie.num_nodes, 30, generator=torch.Generator().manual_seed(0))
    found, asked = run(trie, logits, beams=3, space="trie")
    assert asked.passes == 1
    for group in range(2):
        expected = plain_beam_search(trie, logprobs_of(trie, logits[group], "trie").__getitem__, 3)
        assert_equal(found[group], expected)


def test_titles_whose_further_tokens_are_forced_are_not_scored_when_renormalised_over_the_trie() -> None:
    titles = [[1, 5, 6, 7, EOS], [2, 3, EOS], [2, 4, 8, 8, EOS]]
    trie = Trie.from_titles(titles, eos_token=EOS, tokenizer_fingerprint="")
    logits = torch.randn(4, trie.num_nodes, 10, generator=torch.Generator().manual_seed(0))
    _, asked = run(trie, logits, beams=3, space="trie")
    assert (asked.passes, asked.nodes) == (2, 2 * 4)  # the root, then the one node that branches


def test_beams_that_do_not_run_have_no_parent() -> None:
    trie = Trie.from_titles([[1, EOS], [2, 3, EOS]], eos_token=EOS, tokenizer_fingerprint="")
    search = BeamSearch(DeviceTrie.of(trie), 1, 3, forced_chains="token_by_token")
    parents = []
    while (frontier := search.frontier()).size:
        parents.append(frontier.parent.tolist())
        search.advance(frontier, search.children(frontier, slice(None), torch.zeros(len(frontier.node), 5)))
    assert parents == [[[0, -1, -1]], [[0, 0, -1]], [[1, -1, -1]]]


def test_groups_do_not_depend_on_each_other() -> None:
    trie = random_trie(3, 50, 20, 10)
    logits = torch.randn(8, trie.num_nodes, 20, generator=torch.Generator().manual_seed(1))
    together, _ = run(trie, logits, 8)
    for group in range(8):
        alone, _ = run(trie, logits[group : group + 1], 8)
        assert alone[0].item_class.tolist() == together[group].item_class.tolist()
        np.testing.assert_array_equal(alone[0].score, together[group].score)


@pytest.mark.parametrize("keep", [16, 38, 39])
def test_top_children_of_nodes_of_every_width(keep: int) -> None:
    titles = [[1, EOS], *([2, token, EOS] for token in range(1, 40)), *([3, token, EOS] for token in range(1, 3000))]
    trie = Trie.from_titles(titles, eos_token=EOS, tokenizer_fingerprint="")
    device_trie = DeviceTrie.of(trie)
    node = torch.arange(trie.num_nodes)[:50]
    fanout = np.diff(trie.first_edge)[:50]
    logits = torch.randn(50, 3000, generator=torch.Generator().manual_seed(0))
    found = top_children(device_trie, logits, node, fanout, keep, "vocabulary")
    assert found.logprob.shape == (50, keep)
    logprobs = logits.log_softmax(-1)
    for row in range(50):
        tokens, _ = trie.children(row)
        best = tokens[np.argsort(-logprobs[row, tokens.tolist()].numpy(), kind="stable")][:keep]
        kept = found.logprob[row] > -torch.inf
        expected = best.tolist() if len(tokens) > keep else tokens.tolist()
        assert trie.edge_token[found.edge[row][kept].numpy()].tolist() == expected


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), titles=st.integers(1, 60), vocabulary=st.sampled_from([3, 30]))
def test_chains_are_as_long_as_the_only_way_on(seed: int, titles: int, vocabulary: int) -> None:
    trie = random_trie(seed, titles, vocabulary, 12)
    chain, to_end = DeviceTrie.of(trie).forced
    for start in range(trie.num_nodes):
        node, walked = start, 0
        while len(targets := trie.children(node)[1]) == 1 and targets[0] >= 0:
            node, walked = int(targets[0]), walked + 1
        assert chain[start] == walked
        assert to_end[start] == (len(targets) == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logsumexp_is_float32_for_any_dtype(dtype: torch.dtype) -> None:
    logits = torch.randn(37, 50_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = logits.double().logsumexp(1).float()
    torch.testing.assert_close(logsumexp(logits), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first", [-20.0, -33.0, -1e4, torch.finfo(torch.float32).min, -torch.inf])
def test_logsumexp_and_its_gradient_are_exact_however_unlikely_the_first_token(first: float) -> None:
    logits = 3.0 * torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    logits[::2, 0] = first
    logits.requires_grad_()
    found = logsumexp(logits)
    found.sum().backward()
    exact = logits.detach().double().requires_grad_()
    expected = exact.logsumexp(1)
    expected.sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4e-6)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logsumexp_of_a_row_without_probabilities_is_not_finite(wrong: float) -> None:
    logits = torch.zeros(3, 10)
    logits[1, 4], logits[2] = wrong, -torch.inf
    assert logsumexp(logits).isfinite().tolist() == [True, False, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_search_on_a_gpu_equals_the_cpu() -> None:
    trie = random_trie(5, 60, 30, 10)
    logits = torch.randn(16, trie.num_nodes, 30, generator=torch.Generator().manual_seed(2))
    expected, _ = run(trie, logits, 16)
    device_trie = DeviceTrie.of(trie, "cuda")
    search, logits = BeamSearch(device_trie, 16, 16), logits.cuda()
    while (frontier := search.frontier()).size:
        group = torch.from_numpy(np.repeat(frontier.slot // 16, frontier.count)).cuda()
        answer = logits[group, frontier.node]
        search.advance(frontier, search.children(frontier, slice(None), answer))
    for one, other in zip(search.results(), expected, strict=True):
        assert one.item_class.tolist() == other.item_class.tolist()
