"""The plan of micro-batches: complete, within budget, the same number everywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.micro_batches import plan_micro_batches

plans = given(counts=st.lists(st.integers(1, 300), max_size=60), budget=st.integers(1, 500), ranks=st.integers(1, 5))


@plans
def test_every_group_is_fed_exactly_once(counts: list[int], budget: int, ranks: int) -> None:
    plan = plan_micro_batches(counts, budget, ranks)
    assert sorted(group for rank in plan for micro in rank for group in micro) == list(range(len(counts)))


@plans
def test_every_rank_has_the_same_number_of_micro_batches(counts: list[int], budget: int, ranks: int) -> None:
    plan = plan_micro_batches(counts, budget, ranks)
    assert len(plan) == ranks
    assert len({len(micros) for micros in plan}) == 1
    assert len(plan[0]) >= 1


@plans
def test_only_a_group_above_the_budget_exceeds_it_and_it_is_alone(counts: list[int], budget: int, ranks: int) -> None:
    for rank in plan_micro_batches(counts, budget, ranks):
        for micro in rank:
            assert sum(counts[group] for group in micro) <= budget or len(micro) == 1


@plans
def test_the_number_of_micro_batches_is_at_most_twice_the_least_possible(
    counts: list[int], budget: int, ranks: int
) -> None:
    large = sum(count > budget for count in counts)
    least = large + -(-sum(count for count in counts if count <= budget) // budget)
    assert len(plan_micro_batches(counts, budget, ranks)[0]) <= 2 * -(-least // ranks) + 1


def test_work_is_spread_evenly_over_the_ranks() -> None:
    plan = plan_micro_batches([100] * 16, 450, 4)
    assert [[len(micro) for micro in rank] for rank in plan] == [[4]] * 4


def test_micro_batches_may_be_full_and_those_of_equal_index_are_of_similar_size() -> None:
    assert plan_micro_batches([10, 90, 20, 80], 100, 2) == [[[0, 1]], [[2, 3]]]
    assert plan_micro_batches([50, 60, 30, 50, 70], 100, 2) == [[[0, 2], [1]], [[4], [3]]]  # 80 and 70, 60 and 50


def test_without_groups_every_rank_still_has_one_empty_micro_batch() -> None:
    assert plan_micro_batches([], 100, 2) == [[[]], [[]]]


def test_a_budget_or_a_number_of_ranks_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0 tokens"):
        plan_micro_batches([1], 0, 1)
    with pytest.raises(ValueError, match="and 0 ranks"):
        plan_micro_batches([1], 1, 0)
