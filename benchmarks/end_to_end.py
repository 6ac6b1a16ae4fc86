"""Whole training steps, the project against the published way: rollout, reward, reference, learn, sync.

Both sides start from the same weights, take the same prompts and make real optimizer steps in turn. Each is a process
of its own. Its peak memory is that of the last of these steps: ours, of many processes, makes it once more for that;
the published way, a single one, is watched in it, which costs it a fiftieth of its time at most. In float32 the
candidates of the first step must be identical and its gradient norm equal, or there is no figure.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from benchmarks.harness import Row, row_of_pairs, threads, write_rows
from benchmarks.shapes import ON_GPU, SHAPES, ShapeAbsentError, Workload, build, measurable
from benchmarks.sides import Call, Side, with_memory
from launch.actors import Actors
from launch.placement import plan
from launch.train import Clock

REPEATS = {"tiny-64": 5}
"""Steps that count; else 1, and 3 on a GPU."""
UNCOUNTED = 2 if ON_GPU else 1
"""Steps before them: the first is short and checked; on a GPU, kernels of whole steps are compiled in another."""
WARMUP_GROUPS = {"tiny-64": 16}
"""Groups of the first step of both sides, which is checked but not counted; else 1. They are those of the shortest
prompts."""
GRADIENT_TOLERANCE = 1e-3
PUBLISHED_BATCHES = {} if ON_GPU else {"tiny-64": {"generate_groups": 16, "learn_groups": 4}}
"""Groups at a time that make the published way fastest (benchmarks.published_options)."""
PUBLISHED_BATCH = {"generate_groups": 64, "learn_groups": 16} if ON_GPU else {"generate_groups": 4, "learn_groups": 1}
"""The same for other shapes."""


class Ours:
    """The project's own actors, driven as the training loop drives them."""

    def __init__(self, shape: str, *overrides: str) -> None:
        self.workload = build(SHAPES[shape], *overrides)
        config = self.workload.config
        self.actors = Actors(config, plan(config), self.workload.catalog, self.workload.model_path, 1000)
        self.actors.learner.join()
        self.actors.rollouts.ready(config.cluster.start_timeout_s)
        self.version = 0
        self._sync()

    def step(self, example_ids: Sequence[int]) -> dict[str, Any]:
        """One training step: {"loss", "gradient_norm", "tokens", "seconds" by stage, ...}."""
        rollouts, rewards, learner = self.actors.rollouts, self.actors.rewards, self.actors.learner
        clock = Clock()
        with clock("rollout"):
            tables = rollouts.land(rollouts.launch("train", np.asarray(example_ids), seed=0))
            scoring = [rewards.submit(table, "train") for _, table in tables]
            rollouts.sleep()
        with clock("reward"):
            scored = list(rewards.results(scoring))
        with clock("learn"):
            metrics = learner.step(scored)
        with clock("sync"):
            self.version += 1
            self._sync()
        tokens = {
            row["example_id"]: row["candidate_tokens"]
            for table in ray.get(scored)
            for row in table.select(["example_id", "candidate_tokens"]).to_pylist()
        }
        reference = metrics.get("seconds/reference", 0.0)
        return {
            "loss": metrics["loss"],
            "gradient_norm": metrics["grad_norm"],
            "hit_share": rewards.metrics(scored)["groups_with_hit"],
            "tokens": [candidate for example_id in example_ids for candidate in tokens[example_id]],
            "seconds": clock.seconds | {"reference": reference, "learn": clock.seconds["learn"] - reference},
        }

    def roll_out(self, groups: int) -> None:
        """Rollouts alone, spread over the workers."""
        example_ids, rollouts = np.arange(groups), self.actors.rollouts
        ray.wait([ref for _, ref in rollouts.land(rollouts.launch("train", example_ids, seed=0))])

    def _sync(self) -> None:
        self.actors.rollouts.publish(self.actors.learner.export, version=self.version)
        self.actors.rollouts.loaded()

    def close(self) -> None:
        self.actors.__exit__(None, None, None)


class Theirs:
    """The published way on the same weights and prompts."""

    def __init__(self, shape: str) -> None:
        import torch

        from benchmarks.published_way import PublishedTrainer  # ours has no use for what it imports

        torch.set_num_threads(threads())
        self.workload = build(SHAPES[shape])
        learner = self.workload.config.learner
        self.batches = PUBLISHED_BATCHES.get(shape, PUBLISHED_BATCH)
        self.trainer = PublishedTrainer(
            str(self.workload.model_path),
            self.workload.catalog.trie,
            dtype=learner.dtype,
            group_size=self.workload.config.rollout.group_size,
            beta=learner.beta,
            learning_rate=learner.optimizer.learning_rate,
            gradient_checkpointing=False,
        )

    def step(self, example_ids: list[int]) -> dict[str, Any]:
        prompts, targets = self.workload.prompts(example_ids), self.workload.target_classes(example_ids)
        at_once = {name: min(groups, len(prompts)) for name, groups in self.batches.items()}
        return vars(self.trainer.step(prompts, targets, **at_once))


def measure(shape: str) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one shape and what lies behind them: seconds by stage of both sides, how equal their results were.

    The second row is ours with kl_on=informative on the same examples, right after the pairs and not between them.
    Raises ShapeAbsentError where the model or the data is not here, AssertionError where results differ.
    """
    workload = build(SHAPES[shape])
    steps = [workload.step_examples(step) for step in range(UNCOUNTED + REPEATS.get(shape, 3 if ON_GPU else 1))]
    steps[0] = sorted(steps[0], key=lambda row: len(workload.prompts([row])[0]))[: WARMUP_GROUPS.get(shape, 1)]
    calls = []
    with Side("benchmarks.end_to_end:Ours", shape) as ours, Side("benchmarks.end_to_end:Theirs", shape) as theirs:
        for ids in steps:
            mine = ours.call("step", ids, watched=False)
            calls.append((mine, theirs.call("step", ids, watched=ids is steps[-1])))
            print(f"{shape}: ours {calls[-1][0].seconds:.3g} s, theirs {calls[-1][1].seconds:.3g} s", flush=True)
            if len(calls) == 1:
                check_equal(workload, *calls[0])
        memory = ours.call("step", steps[-1]), calls[-1][1]
    with Side("benchmarks.end_to_end:Ours", shape, "learner.kl_on=informative") as informative:
        sparing = [informative.call("step", ids, watched=False) for ids in steps]
        sparing_memory = informative.call("step", steps[-1])
    pairs, sparing = calls[UNCOUNTED:], sparing[UNCOUNTED:]
    sparing_pairs = [(mine, published) for mine, (_, published) in zip(sparing, pairs, strict=True)]
    hit_share = sum(mine.result["hit_share"] for mine in sparing) / len(sparing)
    rows = [
        with_memory(_row("end-to-end", shape, pairs, ""), *memory),
        with_memory(
            _row("end-to-end-informative", shape, sparing_pairs, f"{hit_share:.0%} of groups with a hit; "),
            sparing_memory,
            memory[1],
        ),
    ]
    details = {
        "shape": shape,
        "ours_stages": [mine.result["seconds"] for mine, _ in pairs],
        "theirs_stages": [published.result["seconds"] for _, published in pairs],
        "identical_candidates": [same_candidates(*pair) for pair in calls],
        "gradient_norms": [[side.result["gradient_norm"] for side in pair] for pair in calls],
        "losses": [[side.result["loss"] for side in pair] for pair in calls],
        "groups_with_hit": [mine.result["hit_share"] for mine, _ in calls],
        "idle_gib": [side.idle_gib for side in calls[0]],
    }
    return rows, details


def _row(case: str, shape: str, pairs: Sequence[tuple[Call, Call]], note: str) -> Row:
    mine, published = (side.result["seconds"] for side in pairs[-1])
    stages = ", ".join(f"{stage} {mine[stage]:.2g}/{published[stage]:.2g} s" for stage in published)
    return row_of_pairs(case, shape, [(ours.seconds, theirs.seconds) for ours, theirs in pairs], note=note + stages)


def check_equal(workload: Workload, ours: Call, theirs: Call) -> None:
    """The first step from equal weights: float32 must agree; bfloat16 rounds differently on both sides."""
    if workload.shape.dtype != "float32":
        return
    assert same_candidates(ours, theirs) == 1.0, f"candidates differ: {same_candidates(ours, theirs):.1%} are the same"
    norms = [side.result["gradient_norm"] for side in (ours, theirs)]
    assert abs(norms[0] - norms[1]) <= GRADIENT_TOLERANCE * max(norms[1], 1e-6), f"gradient norms differ: {norms}"


def same_candidates(ours: Call, theirs: Call) -> float:
    """Share of places in all groups that hold the same candidate."""
    pairs = list(zip(ours.result["tokens"], theirs.result["tokens"], strict=True))
    return sum(mine == published for mine, published in pairs) / len(pairs)


def main(*shapes: str) -> None:
    rows: list[Row] = []
    details = []
    shapes, left_out = (shapes, "") if shapes else measurable(SHAPES)
    for shape in shapes:
        try:
            measured, detail = measure(shape)
        except ShapeAbsentError as absent:
            print(f"{shape}: skipped, {absent}", flush=True)
            continue
        rows += measured
        details.append(detail)
        write_rows(rows, "Whole training steps against the published way", {"details": details}, left_out)


if __name__ == "__main__":
    main(*sys.argv[1:])
