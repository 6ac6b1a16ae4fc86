"""Which groups a rank feeds, without a model."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from learner.config import LearnerConfig
from learner.experience import Experience
from learner.update import PolicyUpdate

PROMPTS = [[1, 2, 3, 4], [5, 6, 7], [8], [9, 10]]


@pytest.mark.parametrize(
    ("informative", "fed"),
    [
        ([], [([8], 0.0), ([8], 0.0)]),
        ([1], [([5, 6, 7], 1.0), ([5, 6, 7], 0.0)]),
        ([0, 1, 3], [([5, 6, 7, 9, 10], 1.0), ([1, 2, 3, 4], 1.0)]),
    ],
)
def test_the_smallest_group_stands_in_for_a_rank_without_any(
    informative: list[int], fed: list[tuple[list[int], float]]
) -> None:
    token = np.array([1], np.int32)
    groups = Experience(
        prompts=PROMPTS,
        candidates=[[token, token]] * 4,
        logprobs=[[np.zeros(1, np.float32)] * 2] * 4,
        rewards=[np.array([float(row in informative), 0.0], np.float32) for row in range(4)],
    )
    policy: Any = SimpleNamespace(
        group_tokens=lambda prompts, candidates: [len(prompt) for prompt in prompts],
        pack=lambda prompts, candidates: [token for prompt in prompts for token in prompt],
    )
    found = []
    for rank in range(2):
        engine: Any = SimpleNamespace(rank=rank, world_size=2, device="cpu")
        update = PolicyUpdate(engine, policy, None, LearnerConfig(beta=0.0), total_steps=1, staleness=0)
        advantages = update._objective.advantages(groups.rewards, True)
        (micro,) = update._micro_batches(groups, advantages)
        found.append((micro.packed, micro.weight))
    assert found == fed
