"""Dynamic sampling keeps the target and the most frequent items."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rollout.dynamic import select


def test_the_target_first_then_by_frequency_then_by_order() -> None:
    drawn = [4, 7, 7, 2, 9, 2, 7, 5]
    assert [drawn[i] for i in select(drawn, target_class=9, group_size=4)] == [9, 7, 2, 4]
    assert [drawn[i] for i in select(drawn, target_class=1, group_size=4)] == [7, 2, 4, 9]


def test_fewer_classes_than_places() -> None:
    assert select([3, 3, 3], target_class=0, group_size=2).tolist() == [0]


@given(
    drawn=st.lists(st.integers(0, 12), min_size=1, max_size=40),
    target=st.integers(0, 12),
    group_size=st.integers(1, 20),
)
def test_select_is_the_rule_written_plainly(drawn: list[int], target: int, group_size: int) -> None:
    count = Counter(drawn)
    by_frequency = sorted(count, key=lambda item: (item != target, -count[item], drawn.index(item)))
    kept = select(np.asarray(drawn, np.int32), target, group_size)
    assert kept.tolist() == [drawn.index(item) for item in by_frequency[:group_size]]
