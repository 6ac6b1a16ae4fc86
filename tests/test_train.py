"""The loop with actors that only take notes."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launch.config import TrainConfig
from launch.data_order import DataOrder
from launch.train import train


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def actors(notes: list[str]) -> Any:
    held = SimpleNamespace(version=0)

    def launch(split: str, ids: np.ndarray, seed: int, passes: np.ndarray) -> str:
        notes.append(f"roll out at {held.version}")
        return "flight"

    def publish(export: object, version: int) -> None:
        held.version = version

    return SimpleNamespace(
        rollouts=SimpleNamespace(
            launch=launch, land=lambda flight: [(0, "table")], publish=publish, loaded=lambda: None, sleep=lambda: None
        ),
        rewards=SimpleNamespace(
            submit=lambda table, split: table,
            results=lambda handles: handles,
            metrics=lambda groups: {"groups_with_hit": 0.5, "reward": 0.0},
        ),
        learner=SimpleNamespace(
            step=lambda groups: {"loss": 0.0},
            export=None,
            save=lambda path, state, keep=None: notes.append(f"save {path}"),
        ),
        save_rollouts=lambda groups, path: None,
    )


class Run:
    """A run directory that remembers the best value."""

    class Folder(str):
        def __truediv__(self, name: str) -> str:
            return name

    best, checkpoints, rollouts = "best", Folder(), Folder()

    def __init__(self) -> None:
        self._best = -1.0

    def log(self, *_: object) -> None:
        pass

    def is_best(self, value: float) -> bool:
        better, self._best = value > self._best, max(value, self._best)
        return better


def run(actors: Any, config: TrainConfig, values: Iterator[float], steps: int) -> None:
    order = DataOrder(8, config.prompts_per_step, 0)
    stage: Any = SimpleNamespace(update=lambda *_: None)
    directory: Any = Run()
    train(actors, order, config, directory, stage, lambda: {"ndcg@10": next(values)}, first=0, steps=steps)


def test_the_best_policy_is_never_newer_than_the_newest_checkpoint(actors: Any, notes: list[str]) -> None:
    config = TrainConfig(prompts_per_step=2, eval_every=2, keep_best=True, checkpoint_every=3)
    run(actors, config, iter([0.1, 0.1, 0.2]), steps=7)
    saved = [note for note in notes if note.startswith("save")]
    assert saved == ["save step-2", "save best", "save step-3", "save step-6", "save best", "save step-7"]


@pytest.mark.parametrize(("staleness", "versions"), [(0, [0, 1, 2, 3, 4]), (1, [0, 0, 1, 3, 3]), (9, [0, 0, 0, 3, 3])])
def test_rollouts_are_of_weights_no_older_than_asked_for(
    actors: Any, notes: list[str], staleness: int, versions: list[int]
) -> None:
    """And none that is launched before an evaluation, here after the third step, is of a step behind it."""
    config = TrainConfig(prompts_per_step=2, staleness=staleness, eval_every=3)
    run(actors, config, iter([0.1]), steps=5)
    assert [note for note in notes if note.startswith("roll")] == [f"roll out at {version}" for version in versions]


def test_groups_are_learned_worker_by_worker_whoever_is_first(actors: Any) -> None:
    learned: list[list[str]] = []
    actors.rollouts.land = lambda flight: [(1, "1a"), (0, "0a"), (1, "1b"), (0, "0b")]
    actors.learner.step = lambda groups: learned.append(groups) or {"loss": 0.0}
    run(actors, TrainConfig(prompts_per_step=4), iter([]), steps=1)
    assert learned == [["0a", "0b", "1a", "1b"]]
