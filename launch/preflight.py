"""What can be known to fail before anything starts; a run and a dry run ask the same."""

import os
from pathlib import Path

from catalog.catalog import Catalog
from launch import trackers
from launch.config import Config, ConfigError
from launch.data_order import DataOrder
from launch.model import check_shape
from launch.placement import Placement, plan
from learner.arithmetic import BatchArithmetic, check_batch, describe_batch
from learner.config import LearnerConfig, objective_names
from learner.deepspeed_keys import check_deepspeed
from rollout.config import RolloutConfig
from rollout.vllm_arguments import LengthError, check_lengths, check_vllm


def check_config(config: Config) -> Placement:
    """The placement of a configuration that nothing is known to be wrong with.

    Raises ConfigError, ObjectiveError, RewardError, EngineError, DeepSpeedKeyError or BatchError. Torch is imported
    only by objectives and rewards that are not the project's own, and by rewards that need it.
    """
    placement = plan(config)  # finds the rewards, to know what their actors reserve
    _check_objective(config.learner, config.train.staleness)
    for tracker in config.train.trackers:
        trackers.resolve(tracker)
    if config.model.path is None:
        check_shape(config.model)
    _check_runs(Path(config.runs))
    check_deepspeed(config.learner.deepspeed)
    check_vllm(config.rollout.vllm)
    check_batch(config.learner, config.train.prompts_per_step)
    return placement


def plan_steps(config: Config, catalog: Catalog, model_path: Path) -> tuple[DataOrder, int, BatchArithmetic]:
    """The order of training examples, the number of steps and what each consists of.

    Raises ConfigError, EngineError or BatchError naming the keys that do not fit the data.
    """
    prompt_tokens, title_tokens = int(catalog.stats["prompt_tokens"]["max"]), int(catalog.trie.max_tokens)
    try:
        check_lengths(model_path, config.rollout, prompt_tokens, title_tokens)
    except LengthError as error:
        longest = catalog.title(catalog.trie.longest_title)
        raise LengthError(f"{error}. The longest title is {longest[:60]!r}...") from error
    examples = len(catalog.examples("train"))
    order = DataOrder(examples, config.train.prompts_per_step, config.train.seed)
    steps = config.train.steps if config.train.steps is not None else order.steps_in(config.train.epochs)
    batch = describe_batch(
        config.learner,
        prompts_per_step=config.train.prompts_per_step,
        group_size=_candidates(config.rollout, len(catalog.titles)),
        steps=steps,
        train_examples=examples,
        prompt_tokens=prompt_tokens,
        title_tokens=title_tokens,
    )
    return order, steps, batch


def _candidates(rollout: RolloutConfig, titles: int) -> int:
    """Of a group, at most: the strategies that never repeat a title give no more than there are."""
    repeats = rollout.strategy in ("sample", "unconstrained")
    return rollout.group_size if repeats else min(rollout.group_size, titles)


def _check_runs(runs: Path) -> None:
    """Raise ConfigError for a folder of runs that can be neither written to nor made."""
    there = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"runs={runs}: no run can be written there, since {there} does not allow it")


def _check_objective(config: LearnerConfig, staleness: int) -> None:
    """Raise ObjectiveError where there is none of that name or import path, or it fails on a small batch."""
    if config.objective in objective_names():
        return
    from learner.objectives import check_objective, resolve

    check_objective(resolve(config.objective), config, staleness)
