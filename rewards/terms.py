"""The terms of a run: checked, shared out among actors, and what those reserve."""

import math
from collections.abc import Sequence

from rewards.config import RewardTerm
from rewards.errors import RewardError
from rewards.interface import check_written
from rewards.registry import resolve

LEAST_SHARE = 0.0001
"""Of a CPU or GPU: Ray counts in such parts."""


def stages_of(terms: Sequence[RewardTerm]) -> list[list[RewardTerm]]:
    """Terms by the actors that compute them: every heavy term alone, and at last all light ones, if any, together.

    Raises RewardError for a term that does not exist or take its args, a bad range, or two terms of one label.
    """
    _check(terms)
    light = [term for term in terms if _is_light(term)]
    return [*([term] for term in terms if term not in light), light]


def replicas_of(stage: Sequence[RewardTerm]) -> list[dict[str, float]]:
    """What each replica of the actor that computes the terms of `stage` reserves: CPUs ("CPU") and GPUs ("GPU")."""
    actor = {"CPU": sum(term.num_cpus for term in stage), "GPU": sum(term.num_gpus for term in stage)}
    return [actor] * max((term.replicas for term in stage), default=1)


def actor_resources(terms: Sequence[RewardTerm]) -> list[dict[str, float]]:
    """What each reward actor of a run reserves, as replicas_of. Raises RewardError as stages_of."""
    return [actor for stage in stages_of(terms) for actor in replicas_of(stage)]


def _is_light(term: RewardTerm) -> bool:
    return getattr(resolve(term.name), "light", False) and not term.num_gpus


def _check(terms: Sequence[RewardTerm]) -> None:
    for index, term in enumerate(terms):
        if term.key in {earlier.key for earlier in terms[:index]}:
            raise RewardError(f"two rewards are called {term.key!r}; give one of them another `label`")
        for name in ("weight", "num_cpus", "num_gpus", "timeout_s"):
            if not math.isfinite(getattr(term, name)):
                raise RewardError(f"reward {term.key!r}: {name}={getattr(term, name)} must be finite")
        for name in ("num_cpus", "num_gpus"):
            if getattr(term, name) < 0:
                raise RewardError(f"reward {term.key!r}: {name}={getattr(term, name)} must not be negative")
            if 0 < getattr(term, name) < LEAST_SHARE:
                raise RewardError(
                    f"reward {term.key!r}: {name}={getattr(term, name)} must be 0 or {LEAST_SHARE} or more"
                )
        if term.num_gpus > 1 and term.num_gpus % 1:
            raise RewardError(
                f"reward {term.key!r}: num_gpus={term.num_gpus} must be a whole number where it is above 1"
            )
        if term.replicas < 1 or not 0 < term.timeout_s <= 1e8:
            raise RewardError(
                f"reward {term.key!r}: replicas={term.replicas} must be 1 or more and timeout_s={term.timeout_s} "
                "greater than 0 and at most 1e8 (three years)"
            )
        check_written(term.key, resolve(term.name), dict(term.args))
