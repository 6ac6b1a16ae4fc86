"""Objectives: one file each, found by name."""

from importlib import import_module

from learner.config import objective_names
from learner.objectives.base import CompletionBatch, Objective, ObjectiveError, check_objective, objective

__all__ = ["CompletionBatch", "Objective", "ObjectiveError", "check_objective", "objective", "resolve"]


def resolve(name_or_path: str) -> Objective:
    """The objective of a file of this folder ("grpo"), or of an import path ("package.module:function", also
    "module.py:function").

    Raises ObjectiveError when there is none or it is not declared with @objective.
    """
    module, separator, attribute = name_or_path.partition(":")
    if not separator:
        if name_or_path not in objective_names():
            raise ObjectiveError(
                f"no objective {name_or_path!r}; known are {objective_names()}, or 'package.module:function'"
            )
        module, attribute = f"{__name__}.{name_or_path}", name_or_path
    module = module.removesuffix(".py").replace("/", ".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ObjectiveError(f"objective {name_or_path!r} cannot be imported: {error}") from error
    if not isinstance(found, Objective):
        raise ObjectiveError(
            f"objective {name_or_path!r} is a {type(found).__name__}; declare it with @learner.objectives.objective"
        )
    return found
