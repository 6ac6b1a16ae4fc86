"""Objectives: one file each, found by name."""

from catalog.own_code import OwnCodeError, find_code
from learner.config import objective_names
from learner.objectives.base import (
    CompletionBatch,
    Objective,
    ObjectiveError,
    check_objective,
    gets_rollout,
    objective,
)

__all__ = ["CompletionBatch", "Objective", "ObjectiveError", "check_objective", "gets_rollout", "objective", "resolve"]


def resolve(name: str) -> Objective:
    """The objective of a file of this folder ("grpo"), of "package.module:function" or of "path/file.py:function".

    Files are looked up from the working directory of the driver, whose modules Ray's actors find, too. Raises
    ObjectiveError when there is none or it is not declared with @objective.
    """
    if ":" not in name and name not in objective_names():
        raise ObjectiveError(
            f"no objective {name!r}; known are {objective_names()}, or 'package.module:function' or "
            "'path/file.py:function'"
        )
    try:
        found = find_code(name if ":" in name else f"{__name__}.{name}:{name}", fits=_is_objective)
    except OwnCodeError as error:
        raise ObjectiveError(f"objective {name!r}: {error}") from error
    if not _is_objective(found):
        raise ObjectiveError(
            f"objective {name!r} is a {type(found).__name__}; declare it with @learner.objectives.objective"
        )
    return found


def _is_objective(value: object) -> bool:
    return isinstance(value, Objective)
