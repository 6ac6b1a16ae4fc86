"""The generated catalogue: repeatable, of any size, and its best ranking against brute force."""

import itertools
import math

import numpy as np
import pytest

from catalog.config import GeneratedConfig
from catalog.errors import CatalogError
from catalog.generate import generate
from catalog.interactions import Interactions
from catalog.markov import FOLLOW, SUCCESSOR_WEIGHTS, Markov
from catalog.metrics import ndcg_at_k
from catalog.product_titles import product_titles
from catalog.ragged import Ragged

SMALL = GeneratedConfig(items=60, users=200, seed=3)


def small_markov(titles: int = 5, departments: int = 2, seed: int = 0) -> Markov:
    draw = np.random.default_rng(seed)
    preference = draw.random((departments, titles))
    return Markov(
        successors=np.stack([draw.permutation(titles)[: len(SUCCESSOR_WEIGHTS)] for _ in range(titles)]),
        preference=preference / preference.sum(1, keepdims=True),
    )


def step(markov: Markov, z: int, before: int, after: int) -> float:
    """The law of one step, as its description says it."""
    followed = sum(
        weight for s, weight in zip(markov.successors[before], SUCCESSOR_WEIGHTS, strict=True) if s == after
    )
    return FOLLOW * followed + (1 - FOLLOW) * markov.preference[z, after]


def test_stationary_distribution_stays_where_it_is() -> None:
    markov = small_markov()
    for z, distribution in enumerate(markov.stationary):
        after = [sum(distribution[i] * step(markov, z, i, j) for i in range(5)) for j in range(5)]
        assert after == pytest.approx(distribution.tolist(), abs=1e-10)
        assert sum(after) == pytest.approx(1)


def test_next_title_has_the_probability_of_all_hidden_pasts_summed() -> None:
    """A window of two titles of a longer sequence: sum over departments and over the titles before the window."""
    markov = small_markov()
    for window in itertools.product(range(5), repeat=2):
        joint = np.zeros(5)
        for z, hidden, after in itertools.product(range(2), range(5), range(5)):
            path = (hidden, *window, after)
            joint[after] += (
                0.5
                * markov.stationary[z, hidden]
                * math.prod(step(markov, z, before, later) for before, later in itertools.pairwise(path))
            )
        np.testing.assert_allclose(markov.next_given(Ragged.from_lists([window]))[0], joint / joint.sum(), atol=1e-10)


def test_probabilities_predict_what_users_do() -> None:
    markov = small_markov(titles=6, departments=3)
    draw = np.random.default_rng(5)
    sequences = markov.sample(np.full(40_000, 4), draw)
    paths = sequences.flat.reshape(-1, 4)
    predicted = markov.next_given(Ragged.from_lists(paths[:, 1:3]))
    happened = np.eye(6)[paths[:, 3]]
    error = np.sqrt((predicted * (1 - predicted)).sum(0)) / len(paths)
    assert (np.abs((happened - predicted).mean(0)) < 4.5 * error).all()
    for title in range(6):  # given the last title, too
        rows = paths[:, 2] == title
        spread = np.sqrt((predicted[rows] * (1 - predicted[rows])).sum(0)) / rows.sum()
        assert (np.abs((happened - predicted)[rows].mean(0)) < 4.5 * spread).all()


def test_best_rank_is_the_place_in_the_sorted_probabilities() -> None:
    markov = small_markov(titles=30, departments=4)
    histories = markov.sample(np.full(200, 3), np.random.default_rng(1))
    target = np.random.default_rng(2).integers(30, size=200)
    order = np.argsort(-markov.next_given(histories), axis=1, kind="stable")
    expected = [order[i].tolist().index(target[i]) for i in range(200)]
    assert markov.best_rank(histories, target).tolist() == expected


def test_nobody_ranks_better_than_the_best_ranking() -> None:
    """Rankings by the last title alone and by the department alone score less on the same examples."""
    draw = np.random.default_rng(0)
    markov = Markov.over(product_titles(100, draw), draw)
    sequences = markov.sample(np.full(4000, 6), draw).flat.reshape(-1, 6)
    histories, target = Ragged.from_lists(sequences[:, :5]), sequences[:, 5]
    best = ndcg_at_k(markov.best_rank(histories, target), 10)
    department = markov.department_given(histories) @ markov.preference
    follow = np.zeros_like(department)
    for slot, weight in enumerate(SUCCESSOR_WEIGHTS):
        follow[np.arange(len(target)), markov.successors[sequences[:, 4], slot]] += weight
    for scores in (department, follow):
        place = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
        assert ndcg_at_k(place[np.arange(len(target)), target], 10) < best


def test_default_leaves_room_to_learn_and_enough_to_measure() -> None:
    test = generate(GeneratedConfig(), max_history=10).splits["test"]
    assert len(test) >= 1000
    assert test.best_rank is not None
    assert 0.4 < ndcg_at_k(test.best_rank, 10) < 0.65


def same(a: Interactions, b: Interactions) -> bool:
    return a.titles.equals(b.titles) and all(
        np.array_equal(a.splits[name].target, b.splits[name].target)
        and np.array_equal(a.splits[name].history.flat, b.splits[name].history.flat)
        and np.array_equal(a.splits[name].timestamp, b.splits[name].timestamp)
        for name in a.splits
    )


def test_same_seed_same_data() -> None:
    assert same(generate(SMALL, 10), generate(SMALL, 10))
    assert not same(generate(SMALL, 10), generate(GeneratedConfig(items=60, users=200, seed=4), 10))


def test_examples_are_the_positions_of_users_in_time_order_cut_80_10_10() -> None:
    data = generate(SMALL, max_history=3)
    sizes = [len(data.splits[name]) for name in ("train", "valid", "test")]
    assert sizes[0] == int(sum(sizes) * 0.8)
    assert sizes[0] + sizes[1] == int(sum(sizes) * 0.9)
    assert (np.diff(np.concatenate([split.timestamp for split in data.splits.values()])) >= 0).all()
    rows = [
        (split.user_id[i].as_py(), split.timestamp[i], split.history[i].tolist(), int(split.target[i]))
        for split in data.splits.values()
        for i in range(len(split))
    ]
    for _, of_user in itertools.groupby(sorted(rows, key=lambda row: row[:2]), key=lambda row: row[0]):
        seen: list[int] = []
        for _, _, history, target in of_user:
            seen = seen or history
            assert history == seen[-3:]
            seen = [*seen, target]


@pytest.mark.parametrize(("items", "duplicates"), [(32, 0.0), (33, 0.5), (35, 0.5), (1000, 0.02), (60_000, 0.0)])
def test_any_number_of_titles_is_distinct_but_for_the_duplicates(items: int, duplicates: float) -> None:
    titles = generate(GeneratedConfig(items=items, users=20, duplicates=duplicates), 10).titles.to_pylist()
    assert len(titles) == items
    assert len(set(titles)) == items - min(round(items * duplicates), items // 2)


def test_titles_share_prefixes_and_some_continue_others() -> None:
    titles = set(generate(GeneratedConfig(), 10).titles.to_pylist())
    families = {title.split(",")[0] for title in titles}
    assert len(families) < len(titles) / 4
    assert any(longer.startswith(shorter + ", ") for shorter, longer in itertools.permutations(titles, 2))


@pytest.mark.parametrize("broken", [{"items": 3}, {"users": 1}, {"duplicates": 0.9}])
def test_impossible_sizes_are_named(broken: dict) -> None:
    with pytest.raises(CatalogError, match=f"{next(iter(broken))}={next(iter(broken.values()))}"):
        generate(GeneratedConfig(**broken), 10)
