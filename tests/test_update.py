"""Which groups a rank feeds and how it weighs them, without a model."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from learner.config import LearnerConfig
from learner.experience import Experience
from learner.mismatch import MismatchError
from learner.update import PolicyUpdate, _of_step

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
        (part,) = update._mini_batches(groups, advantages)
        (micro,) = part.micro_batches
        found.append((micro.packed, micro.weight))
    assert found == fed


@pytest.mark.parametrize(
    ("config", "staleness", "weighted"),
    [({}, 0, False), ({}, 1, True), ({"importance_sampling": "always"}, 0, True)],
)
def test_gains_are_weighted_off_policy_or_where_that_is_asked_for(
    config: dict[str, Any], staleness: int, weighted: bool
) -> None:
    rollout = np.log(np.array([[0.5, 0.2], [0.25, 0.5]], np.float32))
    policy = torch.tensor(np.log([[0.6, 0.2], [0.2, 0.25]]), dtype=torch.float32, requires_grad=True)
    groups = Experience(
        prompts=[[1]],
        candidates=[[np.array([2, 3], np.int32), np.array([4, 5], np.int32)]],
        logprobs=[list(rollout)],
        rewards=[np.array([1.0, 0.0], np.float32)],
    )
    update = PolicyUpdate(
        FakeEngine(policy),  # type: ignore[arg-type]
        SimpleNamespace(group_tokens=lambda *_: [5], pack=lambda *_: FakePacked()),  # type: ignore[arg-type]
        None,
        LearnerConfig(beta=0.0, normalize_std=False, importance_cap=1.1, **config),
        total_steps=1,
        staleness=staleness,
    )
    update.step(groups)
    weight = torch.tensor([[1.1, 1.0], [0.8, 0.5]]) if weighted else torch.ones(2, 2)
    advantage = torch.tensor([[0.5], [-0.5]])
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad, -advantage * weight / 4)


def test_rollouts_of_another_policy_are_refused_and_nothing_is_learned() -> None:
    policy = torch.tensor([[-0.5, -1.0], [-2.0, -0.25]], requires_grad=True)
    modes: list[str] = []
    fake: Any = SimpleNamespace(
        pack=lambda *_: FakePacked(), eval=lambda: modes.append("eval"), train=lambda: modes.append("train")
    )

    def check(rollout: list[list[float]], limit: float) -> None:
        group = Experience(
            prompts=[[1]],
            candidates=[[np.array([2, 3], np.int32), np.array([4, 5], np.int32)]],
            logprobs=[list(np.array(rollout, np.float32))],
            rewards=[np.array([1.0, 0.0], np.float32)],
        )
        engine: Any = FakeEngine(policy)
        config = LearnerConfig(mismatch_limit=limit)
        PolicyUpdate(engine, fake, None, config, total_steps=1, staleness=0).check_rollouts(group)

    check([[-0.5, -1.0], [-2.0, -0.25]], 1e-6)
    other = [[-0.4, -1.0], [-2.0, -0.55]]  # sums of -1.4 for -1.5 and -2.55 for -2.25
    check(other, 0.21)
    with pytest.raises(MismatchError, match=r"differ by 0\.2 on average \(learner\.mismatch_limit=0\.19\)"):
        check(other, 0.19)
    assert policy.grad is None
    assert modes == ["eval", "train"] * 3


class FakePacked:
    """Two candidates of two tokens."""

    mask = torch.ones(2, 2, dtype=torch.bool)
    fed_tokens = 5


class FakeEngine:
    """Of one rank, whose policy gives the same log-probabilities whatever it is fed."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, logp: torch.Tensor) -> None:
        self._logp = logp

    def __call__(self, packed: Any) -> torch.Tensor:
        return self._logp * 1.0

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self, rate: float) -> float:
        return 0.0

    def of_rank_0(self, make: Any) -> Any:
        return make()

    def of_all_ranks(self, value: Any) -> list[Any]:
        return [value]


def test_updates_that_were_fed_nothing_count_in_no_mean_over_candidates() -> None:
    def update(candidates: float, **values: float) -> dict[str, float]:
        zero = dict.fromkeys(("loss", "kl", "logprob", "grad_norm", "packed_tokens"), 0.0)
        return {**zero, **values, "candidates": candidates, "lr": 1e-3}

    fed = [update(1.0, loss=1.0, kl=0.5, logprob=-6.0, packed_tokens=7.0), update(3.0, loss=2.0, kl=0.1, logprob=-2.0)]
    step = _of_step([*fed, update(0.0)], [*fed, update(0.0)])
    assert step == pytest.approx(
        {"loss": 1.0, "kl": 0.3, "logprob": -3.0, "grad_norm": 0.0, "packed_tokens": 7.0, "lr": 1e-3}
    )
    assert _of_step([update(0.0)], [update(0.0)])["logprob"] == 0.0
