"""`rere evaluate`: ranking metrics of one of a run's checkpoints, without starting the run."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from catalog.atomic import atomic_file, check_writable
from catalog.metrics import ranking_metrics
from launch.config import ConfigError
from launch.evaluate import eval_examples, hit_ranks
from launch.policy_of_run import PolicyOfRun
from launch.progress import Progress
from rollout.groups import group_table

GROUPS_AT_ONCE = 64
"""Between two words of progress; the engine itself splits what its cache cannot hold."""


def main(arguments: Sequence[str]) -> int:
    """Print the metrics, and write them with every hit rank where a file is named; 0 on success."""
    options = _parser().parse_args(arguments)
    if options.examples is not None and options.examples < 0:
        raise ConfigError(f"--examples must be 0 (all) or more, got {options.examples}")
    if options.out is not None and options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a folder; name a file")
    if options.out is not None:
        check_writable(options.out)
    policy = PolicyOfRun.of(options.run, options.checkpoint)
    train = policy.config.train
    wanted = train.eval_examples if options.examples is None else options.examples
    config = replace(policy.config, train=replace(train, eval_examples=wanted))
    example_ids = eval_examples(config, policy.catalog, options.split)
    ranks = ranks_of(policy, options.split, example_ids)
    metrics = ranking_metrics(ranks, train.eval_ks)
    available = len(policy.catalog.examples(options.split))
    title = f"{policy.checkpoint}: {len(ranks):,} of {available:,} {options.split} examples"
    Progress().table(title, ["metric", "value"], [[name.upper(), f"{value:.4f}"] for name, value in metrics.items()])
    if options.out is not None:
        content = {"example_ids": example_ids.tolist(), "hit_ranks": ranks.tolist(), "metrics": metrics}
        with atomic_file(options.out) as temporary:
            temporary.write_text(json.dumps({"checkpoint": str(policy.checkpoint), "split": options.split, **content}))
    return 0


def ranks_of(policy: PolicyOfRun, split: str, example_ids: np.ndarray) -> np.ndarray:
    """int64 [n]: the rank of each example's target in the run's evaluation beams, MISS where it is not among them."""
    examples, found = policy.catalog.examples(split), []
    with (
        policy.engine(policy.config.rollout) as engine,
        Progress().stage(f"evaluate {policy.checkpoint.name}", len(example_ids)) as stage,
    ):
        for first in range(0, len(example_ids), GROUPS_AT_ONCE):
            ids = example_ids[first : first + GROUPS_AT_ONCE].tolist()
            prompts = [examples.prompt_tokens(i).tolist() for i in ids]
            targets = [int(examples.target_class[i]) for i in ids]
            beams = policy.config.train.eval_beams
            groups = engine.generate(prompts, [0] * len(ids), targets, group_size=beams, strategy="beam")
            found += hit_ranks(group_table(ids, 0, prompts, targets, groups)).tolist()
            stage.update(len(found))
    return np.array(found, np.int64)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rere evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/default")
    parser.add_argument("--checkpoint", help="one of the run's checkpoints: step-40, sft or best (the newest)")
    parser.add_argument("--split", choices=("test", "valid"), default="test", help="whose examples (test)")
    parser.add_argument("--examples", type=int, help="as many, evenly spaced; 0: all (train.eval_examples)")
    parser.add_argument("--out", type=Path, help="a JSON file for the metrics and every hit rank")
    return parser
