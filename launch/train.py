"""The training loop: draw prompts, roll out, reward, learn, sync."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from launch.actors import Actors
from launch.config import TrainConfig
from launch.data_order import DataOrder
from launch.progress import Stage
from launch.rollout_fleet import Flight
from launch.run_directory import RunDirectory


def train(
    actors: Actors,
    order: DataOrder,
    config: TrainConfig,
    run: RunDirectory,
    stage: Stage,
    *,
    first: int,
    steps: int,
) -> None:
    """Steps first .. steps - 1 of ReRe; the policy version is the number of steps done.

    With staleness k the groups of the next k steps are already being rolled out while a step is learned, so with
    weights at most k versions old. k = 0 is the paper.
    """
    rollouts, rewards, learner = actors.rollouts, actors.rewards, actors.learner
    flights: deque[Flight] = deque()
    launched = first
    for step in range(first, steps):
        clock = Clock()
        with clock("step"):
            while launched < min(steps, step + 1 + config.staleness):
                flights.append(rollouts.launch("train", order[launched], seed=config.seed))
                launched += 1
            with clock("rollout"):
                scoring = [rewards.submit(table, "train") for table in rollouts.land(flights.popleft())]
                if config.staleness == 0:
                    rollouts.sleep()
            with clock("reward"):
                groups = list(rewards.results(scoring))
            with clock("learn"):
                metrics = learner.step(groups)
            with clock("sync"):
                rollouts.publish(learner.export, version=step + 1)
                if config.staleness == 0:
                    rollouts.loaded()

        metrics |= rewards.metrics(groups) | clock.metrics()
        run.log("train", step + 1, metrics)
        stage.update(step + 1, _words(metrics))
        if (step + 1) % config.rollouts_every == 0 or step + 1 == steps:
            actors.save_rollouts(groups, run.rollouts / f"step-{step + 1}.parquet")
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps:
            learner.save(run.checkpoints / f"step-{step + 1}", {"steps_done": step + 1}, keep=config.checkpoints_kept)


class Clock:
    """Seconds of each stage of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        return {f"timing_s/{stage}": seconds for stage, seconds in self.seconds.items()}


def _words(metrics: dict[str, float]) -> str:
    return (
        f"reward {metrics['reward']:+.3f}  hit {metrics['groups_with_hit']:.0%}  loss {metrics['loss']:+.4f}  "
        f"kl {metrics.get('kl', 0.0):.1e}  {metrics['timing_s/step']:.2f} s/step"
    )
