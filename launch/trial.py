"""What only shows when it runs, tried before SFT takes its time."""

from pathlib import Path

import numpy as np

from catalog.catalog import Catalog
from launch.actors import Actors
from launch.config import Config, ConfigError
from launch.evaluate import eval_examples, evaluate
from launch.model_folder import architecture
from rollout.actor import ChecksumMismatch


def trial(actors: Actors, config: Config, model_path: Path) -> None:
    """Load weights, roll out, reward and compare log-probabilities once, and raise what a run would raise later."""
    try_weights(actors, model_path)
    try_groups(actors, config)


def try_weights(actors: Actors, model_path: Path) -> None:
    """Load the weights before training into every worker: those that it cannot take show now."""
    actors.rollouts.publish(actors.learner.export, version=-1)
    try:
        actors.rollouts.loaded()
    except ChecksumMismatch as error:
        raise ConfigError(
            f"model {model_path}: vLLM stores the weights of {architecture(model_path)} in another form than Hugging "
            f"Face, so it cannot be trained ({getattr(error, 'cause', error)})"
        ) from error


def try_groups(actors: Actors, config: Config) -> None:
    """Roll out the longest prompts: one as each evaluation does, and one per worker as training does, to its rewards.

    So a cache that cannot hold them shows now, and rewards that cannot score, and models that vLLM computes otherwise.
    """
    rollouts, rewards, catalog = actors.rollouts, actors.rewards, actors.rollouts.catalog
    for split in ("test", "valid") if config.train.eval_every else ("test",):
        evaluate(rollouts, config, split, longest_prompts(catalog, split, eval_examples(config, catalog, split), 1))
    train = np.arange(len(catalog.examples("train")))
    longest = longest_prompts(catalog, "train", train, len(rollouts.workers))
    flight = rollouts.launch("train", longest, seed=0)
    scoring = [rewards.submit(table, "train") for _, table in rollouts.land(flight)]
    groups = list(rewards.results(scoring))
    rewards.metrics(groups)
    rollouts.sleep()  # the learner comes next
    actors.learner.check_rollouts(groups)


def longest_prompts(catalog: Catalog, split: str, example_ids: np.ndarray, count: int) -> np.ndarray:
    """int64 [at most count]: of some examples of a split those with the longest prompts."""
    lengths = catalog.examples(split).prompt_lengths[example_ids]
    return example_ids[np.argsort(-lengths, kind="stable")[:count]]
