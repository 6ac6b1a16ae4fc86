"""Which worker generates which groups, and from which seeds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.actor import group_seed
from rollout.assign import assign


@given(
    lengths=st.lists(st.integers(1, 600), max_size=80),
    workers=st.integers(1, 7),
    groups_per_table=st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_every_group_goes_to_one_worker_and_the_load_is_even(
    lengths: list[int], workers: int, groups_per_table: int
) -> None:
    plan = assign(lengths, workers, groups_per_table)
    assert plan == assign(lengths, workers, groups_per_table)
    assert sorted(index for share in plan for index in share) == list(range(len(lengths)))
    counts = [len(share) for share in plan]
    assert max(counts) - min(counts) <= 1
    loads = [sum(lengths[i] for i in share) for share in plan]
    assert max(loads) - min(loads) <= max(lengths, default=0) * (1 + (max(counts) > min(counts)))


def test_the_longest_prompts_are_spread_over_workers_and_tables() -> None:
    lengths = [600, 600, 600, 600] + [50] * 28
    plan = assign(lengths, 2, 8)
    tables = [share[i : i + 8] for share in plan for i in range(0, 16, 8)]
    assert [sum(lengths[i] == 600 for i in table) for table in tables] == [1, 1, 1, 1]


def test_group_seeds_differ_and_are_stable() -> None:
    seeds = {group_seed(seed, version, example) for seed in range(8) for version in range(8) for example in range(64)}
    assert len(seeds) == 8 * 8 * 64
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert group_seed(1, 2, 3) == group_seed(1, 2, np.int64(3))
    assert len({group_seed(1, 2, 3, data_pass) for data_pass in range(100)}) == 100
