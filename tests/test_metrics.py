"""Ranking metrics against the definition, and the bootstrap against the normal approximation."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.metrics import MISS, hr_at_k, ndcg_at_k, ndcg_per_example, paired_bootstrap, ranking_metrics
from launch.evaluate import hit_ranks


@given(st.lists(st.integers(-1, 60), min_size=1, max_size=50), st.integers(1, 50))
def test_metrics_equal_their_definition(ranks: list[int], k: int) -> None:
    found = [rank for rank in ranks if 0 <= rank < k]
    metrics = ranking_metrics(np.array(ranks), [k])
    assert metrics[f"hr@{k}"] == pytest.approx(len(found) / len(ranks))
    assert metrics[f"ndcg@{k}"] == pytest.approx(sum(1 / math.log2(rank + 2) for rank in found) / len(ranks))


@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(-1, 5), max_size=8)), max_size=8))
def test_a_hit_rank_is_the_first_place_of_the_target(groups: list[tuple[int, list[int]]]) -> None:
    targets, classes = [target for target, _ in groups], [candidates for _, candidates in groups]
    table = pa.table(
        {"target_class": pa.array(targets, pa.int32()), "candidate_class": pa.array(classes, pa.list_(pa.int32()))}
    )
    expected = [candidates.index(target) if target in candidates else MISS for target, candidates in groups]
    assert hit_ranks(table).tolist() == expected
    assert hit_ranks(pa.concat_tables([table, table])).tolist() == expected * 2


def test_first_place_is_worth_one_and_a_miss_nothing() -> None:
    ranks = np.array([0, 1, 9, 10, -1])
    assert ndcg_per_example(ranks, 10).tolist() == pytest.approx([1, 1 / math.log2(3), 1 / math.log2(11), 0, 0])
    assert hr_at_k(ranks, 10) == pytest.approx(0.6)
    assert hr_at_k(ranks, 1) == ndcg_at_k(ranks, 1) == pytest.approx(0.2)


def test_metrics_of_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match="no examples"):
        ranking_metrics(np.array([], int), [1])
    with pytest.raises(ValueError, match="1 or more"):
        ranking_metrics(np.array([0]), [0])


def test_bootstrap_agrees_with_the_standard_error() -> None:
    draw = np.random.default_rng(0)
    a = draw.random(2000)
    b = a + 0.05 + 0.1 * draw.standard_normal(2000)
    interval = paired_bootstrap(a, b, range(2000), seed=1)
    error = (b - a).std(ddof=1) / math.sqrt(2000)
    assert interval["mean"] == pytest.approx((b - a).mean())
    assert interval["low"] == pytest.approx(interval["mean"] - 1.96 * error, abs=0.1 * error)
    assert interval["high"] == pytest.approx(interval["mean"] + 1.96 * error, abs=0.1 * error)


def test_bootstrap_resamples_pairs_and_is_repeatable() -> None:
    a = np.random.default_rng(0).random(300)
    shifted = paired_bootstrap(a, a + 0.25, range(300), seed=3)
    assert shifted == pytest.approx({"mean": 0.25, "low": 0.25, "high": 0.25})
    assert paired_bootstrap(a, a**2, range(300), seed=3) == paired_bootstrap(a, a**2, range(300), seed=3)
    assert paired_bootstrap(a, a**2, range(300), 3)["low"] != paired_bootstrap(a, a**2, range(300), 4)["low"]


def test_one_user_has_no_interval() -> None:
    gain = paired_bootstrap(np.zeros(3), np.array([0.0, 0.5, 1.0]), ["ann"] * 3, seed=0)
    assert gain == {"mean": 0.5, "low": None, "high": None}


def test_bootstrap_keeps_the_examples_of_a_user_together() -> None:
    draw = np.random.default_rng(0)
    a, gain = draw.random(500), 0.1 * draw.standard_normal(500)
    alone = paired_bootstrap(a, a + gain, [f"user {i}" for i in range(500)], seed=1)
    fourfold = paired_bootstrap(np.tile(a, 4), np.tile(a + gain, 4), [f"user {i}" for i in [*range(500)] * 4], seed=1)
    assert fourfold == pytest.approx(alone)
    uneven = paired_bootstrap(a, a + gain, [min(i, 400) for i in range(500)], seed=1)
    assert uneven["mean"] == pytest.approx(gain.mean())
    shifted = paired_bootstrap(a, a + 0.25, [min(i, 400) for i in range(500)], seed=1)
    assert shifted == pytest.approx({"mean": 0.25, "low": 0.25, "high": 0.25})


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[1.0]])])
def test_bootstrap_refuses_what_is_not_paired(a: list, b: list) -> None:
    with pytest.raises(ValueError, match="equally long"):
        paired_bootstrap(np.array(a), np.array(b), range(len(a)), seed=0)
    with pytest.raises(ValueError, match=r"equally long, .* and 3 users"):
        paired_bootstrap(np.zeros(2), np.ones(2), range(3), seed=0)


def test_the_interval_of_very_many_users_is_the_normal_one() -> None:
    """Of so many there are fewer resamples."""
    users = 100_000
    gain = np.random.default_rng(0).normal(0.1, 1.0, users)
    interval = paired_bootstrap(np.zeros(users), gain, range(users), seed=0)
    assert np.isclose(interval["high"] - interval["low"], 2 * 1.96 / np.sqrt(users), rtol=0.1)
