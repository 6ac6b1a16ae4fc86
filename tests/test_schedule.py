"""Learning rates equal those of the schedulers that the published code used."""

import math

import pytest
import torch
from transformers import get_scheduler

from learner.config import OptimizerConfig
from learner.schedule import learning_rate

HUGGING_FACE = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@pytest.mark.parametrize("schedule", HUGGING_FACE)
@pytest.mark.parametrize(("total", "ratio"), [(6, 0.03), (50, 0.1), (7, 0.0), (2, 0.03), (2, 1.0), (40, 1.0)])
def test_every_rate_equals_hugging_faces(schedule, total, ratio):
    config = OptimizerConfig(learning_rate=1e-3, schedule=schedule, warmup_ratio=ratio)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    expected = get_scheduler(HUGGING_FACE[schedule], optimizer, math.ceil(ratio * total), total)
    for step in range(total):
        assert learning_rate(config, step, total) == pytest.approx(expected.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        expected.step()


@pytest.mark.parametrize("schedule", HUGGING_FACE)
@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 1.0])
def test_every_schedule_trains(schedule, total, ratio):
    config = OptimizerConfig(learning_rate=1e-3, schedule=schedule, warmup_ratio=ratio)
    assert max(learning_rate(config, step, total) for step in range(total)) >= 0.5e-3


def test_the_published_trajectory_has_these_rates():
    config = OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_ratio=0.03)
    rates = [learning_rate(config, step, 6) for step in range(6)]
    assert rates == pytest.approx([0, 1e-3, 9.045e-4, 6.545e-4, 3.455e-4, 9.55e-5], rel=1e-3)


def test_a_step_beyond_the_end_keeps_the_last_rate():
    config = OptimizerConfig(schedule="linear")
    assert learning_rate(config, 15, 10) == 0.0
    only_warm_up = OptimizerConfig(schedule="linear", warmup_ratio=1.0)
    assert learning_rate(only_warm_up, 10, 10) == only_warm_up.learning_rate
