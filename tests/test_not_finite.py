"""Logits that are not finite are an error, from every search and both engines; -inf for some tokens is none."""

from typing import Any

import numpy as np
import pytest
import torch
from engine_oracle import generate, named_weights
from pretended_gpu import pretended_gpu
from search_oracle import random_trie
from test_pretended_gpu import GROUPS, SEARCHES, WIDTH, search

from catalog.trie import Trie
from rollout.config import LogprobSpace
from rollout.device_trie import DeviceTrie
from rollout.finite import LogitsError
from rollout.group_beam import GroupBeam
from rollout.groups import Candidates, GroupTableError, group_table, validate_groups
from rollout.search import BeamSearch
from rollout.weights import WeightBucket

TRIE = random_trie(0, 60, WIDTH, 10)
CONSTRAINED = [name for name in SEARCHES if name != "unconstrained"]
MESSAGE = r"logits are not finite.*learner\.optimizer\.learning_rate.*rollout\.dtype"


def plain_logits() -> torch.Tensor:
    return torch.randn(GROUPS, TRIE.num_nodes, WIDTH, generator=torch.Generator().manual_seed(0))


def of_whole_model(wrong: float) -> torch.Tensor:
    return torch.full((GROUPS, TRIE.num_nodes, WIDTH), wrong)


def of_one_row(wrong: float) -> torch.Tensor:
    """All but the logits of one group at the root."""
    logits = plain_logits()
    logits[2, 0] = wrong
    return logits


def of_one_child(wrong: float) -> torch.Tensor:
    logits = plain_logits()
    logits[2, 0, int(TRIE.children(0)[0][1])] = wrong
    return logits


def of_no_child(wrong: float) -> torch.Tensor:
    """Of a token that begins no title."""
    logits = plain_logits()
    logits[2, 0, sorted(set(range(WIDTH)) - set(TRIE.children(0)[0].tolist()))[0]] = wrong
    return logits


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("space", ["vocabulary", "trie"])
@pytest.mark.parametrize("strategy", SEARCHES)
def test_every_search_refuses_logits_that_are_not_finite(strategy: str, space: LogprobSpace, device: str) -> None:
    wrong = [of_whole_model(torch.nan), of_one_row(torch.nan), of_one_child(torch.nan), of_one_child(torch.inf)]
    wrong += [of_one_row(-torch.inf)]
    if space == "vocabulary" or strategy == "unconstrained":
        wrong += [of_no_child(torch.nan), of_no_child(torch.inf)]
    with pretended_gpu() as gpu:
        for logits in wrong if device == "cpu" else wrong[1::5]:
            made = SEARCHES[strategy](DeviceTrie.of(TRIE, device), space)
            with pytest.raises(LogitsError, match=MESSAGE):
                search(made, logits.to(device), gpu if device == "cuda" else None)


@pytest.mark.parametrize("space", ["vocabulary", "trie"])
@pytest.mark.parametrize("strategy", SEARCHES)
def test_tokens_that_cannot_come_are_left_out(strategy: str, space: LogprobSpace) -> None:
    logits = plain_logits()
    never = int(TRIE.children(0)[0][1])
    logits[..., [never, *set(range(WIDTH)) - set(TRIE.edge_token.tolist())]] = -torch.inf
    for node in range(TRIE.num_nodes):  # no title is left without a way on
        tokens = TRIE.children(node)[0].tolist()
        if tokens == [never]:
            logits[:, node, never] = 0.0
    found = search(SEARCHES[strategy](DeviceTrie.of(TRIE), space), logits)
    assert all(tokens[0] != never for group in found for tokens in group.tokens)
    assert all(np.isfinite(group.score).all() and len(group.score) for group in found)


def test_both_engines_find_fewer_titles_than_beams_where_others_cannot_come() -> None:
    end = 9
    trie = Trie.from_titles([[5, end], [5, 7, end], [0, 1, end], [2, 1, end]], eos_token=end, tokenizer_fingerprint="")
    logits = torch.zeros(1, trie.num_nodes, end + 1)
    logits[..., [0, 2]] = -torch.inf
    logits[..., end] = 1.0
    (by_tensors,) = search(BeamSearch(DeviceTrie.of(trie), 1, 4), logits)
    by_requests = GroupBeam(trie, 4)
    while nodes := by_requests.advance():
        for node in nodes:
            by_requests.score(node, dict(enumerate(logits[0, node].log_softmax(-1).tolist())))
    for group in (by_tensors, by_requests.result()):
        assert [tokens.tolist() for tokens in group.tokens] == [[5, end], [5, 7, end]]
        assert np.isfinite(group.score).all()


def test_a_beam_without_a_way_on_ends_where_others_go_on() -> None:
    logits = plain_logits()
    node = int(TRIE.children(0)[1].max())
    logits[:, node, TRIE.children(node)[0].tolist()] = -torch.inf
    assert all(len(group.score) for group in search(SEARCHES["beam"](DeviceTrie.of(TRIE), "vocabulary"), logits))


@pytest.mark.parametrize("space", ["vocabulary", "trie"])
@pytest.mark.parametrize("strategy", CONSTRAINED)
def test_logits_without_a_way_on_are_named_as_such_where_they_are_refused(strategy: str, space: LogprobSpace) -> None:
    """Everywhere but in beam search that normalises over the vocabulary."""
    logits = plain_logits()
    first, nodes = TRIE.children(0)
    widest = int(np.diff(TRIE.first_edge)[nodes].argmax())
    logits[:, 0, int(first[widest])] = 9.0
    logits[:, int(nodes[widest]), TRIE.children(int(nodes[widest]))[0].tolist()] = -torch.inf
    made = SEARCHES[strategy](DeviceTrie.of(TRIE), space)
    if strategy.startswith("beam") and space == "vocabulary":
        assert all(len(group.score) for group in search(made, logits))
    else:
        with pytest.raises(LogitsError, match=r"or leave no token that the trie allows.*learning_rate"):
            search(made, logits)


@pytest.mark.parametrize("engine_name", ["worker_engine", "requests_engine"])
def test_both_engines_refuse_a_model_that_has_diverged(
    request: pytest.FixtureRequest, engine_name: str, model: Any, prompts: list[list[int]]
) -> None:
    engine = request.getfixturevalue(engine_name)
    good = [WeightBucket.pack(named_weights(model))]
    diverged = {name: tensor.clone() for name, tensor in named_weights(model)}
    diverged["model.norm.weight"][3] = torch.nan
    expected = generate(engine, prompts[:3], 4)
    engine.load_weights([WeightBucket.pack(diverged.items())])
    try:
        for strategy in ("beam", "sample", "dynamic", "stochastic_beam", "unconstrained"):
            with pytest.raises(LogitsError, match=MESSAGE):
                generate(engine, prompts[:3], 4, strategy=strategy)
    finally:
        engine.load_weights(good)
    for group, before in zip(generate(engine, prompts[:3], 4), expected, strict=True):
        assert group.item_class.tolist() == before.item_class.tolist()


def a_group(size: int, score: float = -1.0) -> Candidates:
    rows = [np.zeros(2, np.int32)] * size
    logprobs = [np.full(2, -0.5, np.float32)] * size
    return Candidates(rows, logprobs, np.zeros(size, np.int32), np.full(size, score, np.float32))


def test_a_table_with_an_empty_group_or_a_score_that_is_not_finite_is_refused() -> None:
    def table(*groups: Candidates) -> Any:
        return group_table(range(7, 7 + len(groups)), 0, [[1]] * len(groups), [0] * len(groups), groups)

    validate_groups(table(a_group(2), a_group(1)))
    validate_groups(table())
    with pytest.raises(GroupTableError, match=r"row 1 \(example 8\) has no candidates"):
        validate_groups(table(a_group(2), a_group(0), a_group(1)))
    for score in (np.nan, -np.inf):
        with pytest.raises(GroupTableError, match=rf"row 2 \(example 9\) has a score of {score}"):
            validate_groups(table(a_group(2), a_group(1), a_group(3, score)))
