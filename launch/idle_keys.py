"""Keys that were set and can do nothing, given the others: seldom what was meant."""

from collections.abc import Callable
from operator import attrgetter

from launch.config import Config
from learner.arithmetic import CLIPPING
from learner.config import objective_names


def _clips(config: Config) -> bool:
    """Whether a bound of the ratio can bind: with one optimizer step of a batch it is 1. An own objective may ask."""
    learner = config.learner
    if learner.objective not in objective_names():
        return True
    return learner.objective in CLIPPING and learner.updates_per_step > 1


NEEDS: tuple[tuple[tuple[str, ...], str, Callable[[Config], bool]], ...] = (
    (("rollout.temperature",), "a rollout.strategy that samples", lambda config: config.rollout.strategy != "beam"),
    (("rollout.oversample",), "rollout.strategy=dynamic", lambda config: config.rollout.strategy == "dynamic"),
    (
        ("rollout.max_completion_tokens",),
        "rollout.strategy=unconstrained",
        lambda config: config.rollout.strategy == "unconstrained",
    ),
    (
        ("learner.kl_on", "learner.reference_sync_every", "learner.reference_sync_alpha", "learner.reference_offload"),
        "learner.beta above 0",
        lambda config: config.learner.beta > 0,
    ),
    (
        ("learner.clip_low", "learner.clip_high"),
        "an objective that clips and several optimizer steps on a batch (learner.updates_per_batch or mini_batches)",
        _clips,
    ),
    (
        ("learner.lora.alpha", "learner.lora.dropout", "learner.lora.target_modules"),
        "learner.lora.rank above 0",
        lambda config: config.learner.lora.rank > 0,
    ),
)
"""Keys, what they have no effect without, and whether that is there."""


def idle_keys(config: Config) -> list[str]:
    """A note for each key that differs from its default in vain."""
    default = Config()
    return [
        f"note: {key}={attrgetter(key)(config)} has no effect without {needed}"
        for keys, needed, there in NEEDS
        for key in keys
        if attrgetter(key)(config) != attrgetter(key)(default) and not there(config)
    ]
