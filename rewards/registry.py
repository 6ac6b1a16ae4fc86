"""From the name of a reward to the function or class that it stands for."""

import difflib
import importlib
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from catalog.code_file import module_of_file
from catalog.errors import traceback_below
from rewards.errors import RewardError

ENTRY_POINTS = "rere.rewards"
"""Entry-point group in which installed packages register rewards."""

BUILT_IN = {
    "rule": "rewards.rule:Rule",
    "ranking": "rewards.ranking:Ranking",
    "ranking_only": "rewards.ranking:Ranking",  # the paper's setting of that name: this term and no rule
    "semantic": "rewards.semantic:Semantic",
    "collaborative": "rewards.collaborative:Collaborative",
    "diversity": "rewards.diversity:Diversity",
    "popularity": "rewards.popularity:Popularity",
    "http": "rewards.http:Http",
}


def resolve(name: str, root: Path | None = None) -> Any:
    """The function or class of a registered name, "package.module:Name" or "path/file.py:name".

    Modules and relative files are looked up from `root`, the working directory by default, as well as among the
    installed packages. Raises RewardError that names what is missing and what there is.
    """
    root = root or Path.cwd()
    if ":" not in name:
        return _registered(name)
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise RewardError(f"reward {name!r}: write 'package.module:Name' or 'path/file.py:name'")
    module = _module_of_file(root / place, name) if place.endswith(".py") else _module_of_import(place, name, root)
    if not hasattr(module, attribute):
        written = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
        own = [key for key, value in written.items() if getattr(value, "__module__", None) == module.__name__]
        public = ", ".join(own or written)
        raise RewardError(f"reward {name!r}: {place} has no {attribute!r}; it has {public or 'nothing to call'}")
    return getattr(module, attribute)


def registered_names() -> list[str]:
    """Built-in names, then those of installed packages."""
    return [*BUILT_IN, *sorted({entry.name for entry in entry_points(group=ENTRY_POINTS)} - BUILT_IN.keys())]


def _registered(name: str) -> Any:
    if name in BUILT_IN:
        place, _, attribute = BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(place), attribute)
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        try:
            return entry.load()
        except (Exception, SystemExit) as error:
            raise RewardError(f"reward {name!r}: its entry point {entry.value!r} does not load: {error!r}") from error
    if name.endswith(".py"):
        raise RewardError(f"reward {name!r}: add which reward of the file, as in '{name}:my_reward'")
    names = registered_names()
    near = difflib.get_close_matches(name, names, n=1)
    raise RewardError(
        f"reward {name!r} is not registered{f'; did you mean {near[0]!r}' if near else ''}. There are "
        f"{', '.join(names)}; or give an import path 'package.module:Name' or a file 'path/file.py:name'"
    )


def _module_of_import(place: str, name: str, root: Path) -> ModuleType:
    if str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(error.name + ".")):
            raise RewardError(
                f"reward {name!r}: there is no module {error.name!r}, neither installed nor under {root}"
            ) from None
        raise RewardError(
            f"reward {name!r}: {place} needs the module {error.name!r}, which is missing\n"
            f"{traceback_below(error, __file__)}"
        ) from error
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"reward {name!r}: importing {place} failed: {error!r}\n{traceback_below(error, __file__)}"
        ) from error


def _module_of_file(file: Path, name: str) -> ModuleType:
    file = file.resolve()
    if not file.is_file():
        raise RewardError(f"reward {name!r}: there is no file {file}")
    try:
        return module_of_file(file)
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"reward {name!r}: running {file} failed: {error!r}\n{traceback_below(error, __file__)}"
        ) from error
