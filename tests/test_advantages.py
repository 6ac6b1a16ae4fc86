"""Advantages against torch's own statistics and their definitions."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import group_advantages, informative, leave_one_out_advantages, rank_advantages

rewards_of_groups = st.lists(
    st.lists(st.floats(-3, 3, allow_nan=False, width=32), min_size=1, max_size=20).map(np.asarray), max_size=6
)


@given(rewards_of_groups)
def test_group_advantages_are_standardised_within_each_group(rewards: list[np.ndarray]) -> None:
    for group, advantages in zip(rewards, group_advantages(rewards), strict=True):
        values = torch.tensor(group, dtype=torch.float64)
        if len(group) < 2 or np.ptp(group) == 0:
            assert not advantages.any()
        else:
            expected = (values - values.mean()) / (values.std(unbiased=True) + 1e-4)
            np.testing.assert_allclose(advantages, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_without_std_only_the_mean_is_subtracted() -> None:
    (advantages,) = group_advantages([np.array([1.0, 0.0, 0.0, 0.0])], normalize_std=False)
    np.testing.assert_allclose(advantages, [0.75, -0.25, -0.25, -0.25])


@given(rewards_of_groups)
def test_leave_one_out_subtracts_the_mean_of_the_others(rewards: list[np.ndarray]) -> None:
    for group, advantages in zip(rewards, leave_one_out_advantages(rewards), strict=True):
        for index, advantage in enumerate(advantages):
            others = np.delete(group, index)
            expected = group[index] - others.mean() if len(others) else 0.0
            assert advantage == pytest.approx(expected, abs=1e-5)


def test_rank_advantages_compare_the_same_rank_of_different_lists() -> None:
    hit_first, hit_second, no_hit = np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0]), np.zeros(3)
    first, second, none = rank_advantages([hit_first, hit_second, no_hit])
    spread = 0.5 / (np.std([1, 0], ddof=1) + 1e-4)
    np.testing.assert_allclose(first, [spread, -spread, 0.0], rtol=1e-6)
    np.testing.assert_allclose(second, [-spread, spread], rtol=1e-6)
    assert not none.any()


def test_equal_rewards_are_exactly_uninformative_whatever_their_rounding() -> None:
    advantages = group_advantages([np.full(7, 0.1), np.array([0.1, 0.2]), np.array([5.0])])
    assert informative(advantages).tolist() == [False, True, False]


def test_no_groups_have_no_advantages() -> None:
    assert group_advantages([]) == rank_advantages([]) == leave_one_out_advantages([]) == []


@pytest.mark.parametrize("advantages", [group_advantages, rank_advantages, leave_one_out_advantages])
def test_a_group_without_candidates_has_no_advantages(advantages: Callable) -> None:
    assert [group.tolist() for group in advantages([np.array([]), np.array([0.5, 0.5])])] == [[], [0.0, 0.0]]
