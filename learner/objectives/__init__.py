"""Objectives: one file each, found by name."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from catalog.code_file import module_of_file
from catalog.errors import traceback_below
from learner.config import objective_names
from learner.objectives.base import CompletionBatch, Objective, ObjectiveError, check_objective, objective

__all__ = ["CompletionBatch", "Objective", "ObjectiveError", "check_objective", "objective", "resolve"]


def resolve(name_or_path: str) -> Objective:
    """The objective of a file of this folder ("grpo"), of an import path ("package.module:function"), or of a file
    ("path/file.py:function", from the working directory of the driver).

    Raises ObjectiveError when there is none or it is not declared with @objective.
    """
    place, separator, attribute = name_or_path.partition(":")
    if not separator:
        if name_or_path not in objective_names():
            raise ObjectiveError(
                f"no objective {name_or_path!r}; known are {objective_names()}, or 'package.module:function' or "
                "'path/file.py:function'"
            )
        place, attribute = f"{__name__}.{name_or_path}", name_or_path
    module = _module(place, name_or_path)
    if not hasattr(module, attribute):
        declared = [key for key, value in vars(module).items() if isinstance(value, Objective)]
        raise ObjectiveError(
            f"objective {name_or_path!r}: {place} has no {attribute!r}; its objectives are {declared or 'none'}"
        )
    found = getattr(module, attribute)
    if not isinstance(found, Objective):
        raise ObjectiveError(
            f"objective {name_or_path!r} is a {type(found).__name__}; declare it with @learner.objectives.objective"
        )
    return found


def _module(place: str, name: str) -> ModuleType:
    try:
        return module_of_file(_file(place)) if place.endswith(".py") else import_module(place)
    except (Exception, SystemExit) as error:
        raise ObjectiveError(
            f"objective {name!r} cannot be imported: {error!r}\n{traceback_below(error, __file__)}"
        ) from error


def _file(place: str) -> Path:
    """Looked up where modules are, since the learner's ranks have the driver's working directory only there."""
    for folder in sys.path:
        if (file := Path(folder) / place).is_file():
            return file
    raise FileNotFoundError(f"there is no file {place}")
