"""The data order covers every example once per pass and depends on the seed and the step alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.data_order import DataOrder


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))
def test_each_pass_visits_every_example_once(num_examples: int, per_step: int, seed: int) -> None:
    if num_examples < per_step:
        with pytest.raises(ValueError, match=r"train\.prompts_per_step"):
            DataOrder(num_examples, per_step, seed)
        return
    order = DataOrder(num_examples, per_step, seed)
    steps = 2 * num_examples
    drawn = np.concatenate([order[step] for step in range(steps)])
    for epoch in range(steps * per_step // num_examples):
        part = drawn[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(part) == list(range(num_examples))


@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 5))
def test_no_example_comes_twice_in_a_pass(num_examples: int, per_step: int, seed: int) -> None:
    order = DataOrder(max(num_examples, per_step), per_step, seed)
    drawn = [place for step in range(40) for place in zip(order[step], order.passes(step), strict=True)]
    assert len(set(drawn)) == len(drawn) == 40 * per_step


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 12))
def test_epochs_take_the_steps_that_fit_into_them_and_one_at_least(
    num_examples: int, per_step: int, quarters: int
) -> None:
    steps = DataOrder(max(num_examples, per_step), per_step, 0).steps_in(quarters / 4)
    examples = quarters * max(num_examples, per_step) / 4
    assert steps == 1 or 1 < steps <= examples / per_step
    assert (steps + 1) * per_step > examples


def test_every_pass_of_every_seed_has_an_order_of_its_own() -> None:
    orders = {tuple(DataOrder(50, 50, seed)[epoch]) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_pass_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled = []
    real = DataOrder._shuffled
    monkeypatch.setattr(DataOrder, "_shuffled", lambda self, epoch: shuffled.append(epoch) or real(self, epoch))
    order = DataOrder(100, 7, 3)
    for step in range(40):
        order[step]
    assert shuffled == [0, 1, 2]


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    first, second = DataOrder(100, 7, 3), DataOrder(100, 7, 3)
    later = second[40]
    assert np.array_equal(first[40], later)
    assert not np.array_equal(DataOrder(100, 7, 4)[40], later)
