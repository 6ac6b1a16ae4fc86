"""From the name of a reward to the function or class that it stands for."""

import difflib
import importlib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from catalog.own_code import OwnCodeError, find_code
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
    if ":" not in name:
        return _registered(name)
    try:
        return find_code(name, root)
    except OwnCodeError as error:
        raise RewardError(f"reward {name!r}: {error}") from error


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
