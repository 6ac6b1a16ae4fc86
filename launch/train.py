"""The training loop: draw prompts, roll out, reward, learn, sync."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter

from launch.actors import Actors
from launch.config import TrainConfig
from launch.data_order import DataOrder
from launch.progress import Stage
from launch.rollout_fleet import Flight
from launch.run_directory import RunDirectory

RECENT = 20
"""Steps whose means are shown."""


def train(
    actors: Actors,
    order: DataOrder,
    config: TrainConfig,
    run: RunDirectory,
    stage: Stage,
    validate: Callable[[], dict[str, float]],
    *,
    first: int,
    steps: int,
) -> None:
    """Steps first .. steps - 1 of ReRe; the policy version is the number of steps done.

    With staleness k the groups of the next k steps are already being rolled out while a step is learned, so with
    weights at most k versions old. k = 0 is the paper. No step after an evaluation is rolled out before it.

    validate: metrics of the published weights, asked for after every config.eval_every-th step.
    """
    rollouts, rewards, learner = actors.rollouts, actors.rewards, actors.learner
    flights: deque[Flight] = deque()
    recent: deque[dict[str, float]] = deque(maxlen=RECENT)
    validated: dict[str, float] = {}
    launched = first
    for step in range(first, steps):
        clock = Clock()
        with clock("step"):
            while launched < min(steps, step + 1 + config.staleness, _next_evaluation(step, config.eval_every, steps)):
                flights.append(
                    rollouts.launch("train", order[launched], seed=config.seed, passes=order.passes(launched))
                )
                launched += 1
            with clock("rollout"):
                scoring = [(rank, rewards.submit(table, "train")) for rank, table in rollouts.land(flights.popleft())]
                if config.staleness == 0:
                    rollouts.sleep()
            with clock("reward"):
                scoring.sort(key=itemgetter(0))  # so that what a step learns does not depend on who is first
                groups = list(rewards.results([scored for _, scored in scoring]))
            with clock("learn"):
                metrics = learner.step(groups)
            with clock("sync"):
                rollouts.publish(learner.export, version=step + 1)
                if config.staleness == 0:
                    rollouts.loaded()

        metrics |= rewards.metrics(groups) | clock.metrics()
        run.log("train", step + 1, metrics)
        recent.append(metrics)
        best = False
        if config.eval_every and (step + 1) % config.eval_every == 0:
            validated = validate()
            value = validated[f"ndcg@{max(config.eval_ks)}"]
            best = config.keep_best and run.is_best(value)
            run.log("valid", step + 1, validated)
        stage.update(step + 1, step_words(recent, validated))
        if (step + 1) % config.rollouts_every == 0 or step + 1 == steps:
            actors.save_rollouts(groups, run.rollouts / f"step-{step + 1}.parquet")
        state = {"steps_done": step + 1} | ({"value": value} if best else {})
        if best or (step + 1) % config.checkpoint_every == 0 or step + 1 == steps:
            learner.save(run.checkpoints / f"step-{step + 1}", state, keep=config.checkpoints_kept)
        if best:  # after a checkpoint that is as new, which knows it where the run ends in between
            learner.save(run.best, state)


def _next_evaluation(step: int, every: int, steps: int) -> int:
    """The number of steps that are done when the next evaluation takes place; `steps` where there is none."""
    return (step // every + 1) * every if every else steps


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


def step_words(recent: Sequence[dict[str, float]], validated: dict[str, float]) -> str:
    """Means over the last steps, since a single one says little, and the last of the validation metrics.

    The mean reward hardly moves: ranking rewards add up to about 0 in every group. An objective of one's own may have
    no KL.
    """
    mean = {
        name: sum(metrics.get(name, 0.0) for metrics in recent) / len(recent)
        for name in ("groups_with_hit", "reward", "loss", "kl", "timing_s/step")
        if any(name in metrics for metrics in recent)
    }
    words = [f"hit {mean['groups_with_hit']:.0%}", f"reward {mean['reward']:+.4f}"]
    words += [f"{name} {mean[name]:{form}}" for name, form in (("loss", "+.1e"), ("kl", ".1e")) if name in mean]
    words += [f"{mean['timing_s/step']:.2f} s/step"]
    return "  ".join(words + [f"valid {name} {value:.4f}" for name, value in list(validated.items())[-1:]])
