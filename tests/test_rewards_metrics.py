"""What is logged about rewards, against worked groups and a straightforward count."""

import numpy as np
import pyarrow as pa
import pytest

from learner.objectives.base import METRICS_OF_STAGES, OTHERS_METRICS
from rewards.metrics import reward_metrics

FLOATS = pa.list_(pa.float32())


def scored(
    candidates: list[list[int]], targets: list[int], reward: list[list[float]], rule: list[list[float]]
) -> pa.Table:
    return pa.table(
        {
            "candidate_class": pa.array(candidates, pa.list_(pa.int32())),
            "target_class": pa.array(targets, pa.int32()),
            "reward/rule": pa.array(rule, FLOATS),
            "reward": pa.array(reward, FLOATS),
        }
    )


def test_no_objective_may_take_their_names() -> None:
    metrics = reward_metrics([scored([[5, 6]], [6], [[-1, 2]], [[0, 1]])])
    assert {name for name in metrics if not name.startswith(METRICS_OF_STAGES)} <= OTHERS_METRICS


def test_worked_by_hand() -> None:
    first = scored([[5, 6, 7], [1, 2, 3]], [6, 9], [[-1, 2, -1], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]])
    second = scored([[4, -1]], [4], [[3, 1]], [[1, 0]])
    metrics = reward_metrics([first, second])
    assert metrics == pytest.approx(
        {
            "reward": 4 / 8,
            "reward_std": (np.std([-1, 2, -1], ddof=1) + 0 + np.std([3, 1], ddof=1)) / 3,
            "frac_reward_zero_std": 1 / 3,
            "groups_with_hit": 2 / 3,
            "invalid_candidates": 1,
            "rewards/rule/mean": 2 / 8,
            "rewards/rule/std": np.std([0, 1, 0, 0, 0, 0, 1, 0], ddof=1),
            "hits/rank_0": 1 / 3,
            "hits/rank_1": 1 / 3,
            "hits/rank_2": 0.0,
        }
    )


def test_equal_to_a_count_over_random_groups() -> None:
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 9, size=50)
    candidates = [draw.integers(0, 6, size=size).tolist() for size in sizes]
    targets = draw.integers(0, 6, size=50).tolist()
    rewards = [draw.choice([0.0, 1.0, -0.5], size=size).tolist() for size in sizes]
    table = scored(candidates, targets, rewards, rewards)
    metrics = reward_metrics([table.slice(0, 20), table.slice(20)])
    stds = [np.std(row, ddof=1) if len(row) > 1 else 0.0 for row in rewards]
    assert metrics["reward"] == pytest.approx(np.mean(np.concatenate(rewards)))
    assert metrics["reward_std"] == pytest.approx(np.mean(stds))
    assert metrics["frac_reward_zero_std"] == pytest.approx(np.mean(np.array(stds) == 0))
    found = [target in row for row, target in zip(candidates, targets, strict=True)]
    assert metrics["groups_with_hit"] == pytest.approx(np.mean(found))
    for rank in range(8):
        hit = [len(row) > rank and row[rank] == target for row, target in zip(candidates, targets, strict=True)]
        assert metrics[f"hits/rank_{rank}"] == pytest.approx(np.mean(hit))


def test_no_groups_have_no_metrics() -> None:
    assert reward_metrics([]) == {}
    assert reward_metrics([scored([], [], [], [])]) == {}


def test_rewards_that_differ_a_little_teach_something_and_class_0_is_a_title() -> None:
    metrics = reward_metrics([scored([[0, 1], [0, 0]], [1, 2], [[0.5, 0.501], [1, 1]], [[0, 1], [0, 0]])])
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["invalid_candidates"] == 0
