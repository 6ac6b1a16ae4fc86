"""What differs between two configurations, key by key."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import reduce
from typing import Any

from launch.config import Config


def differences(saved: Config, config: Config, name: str) -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of all that differs at or below a key."""
    old, new = (dict(_leaves(name, reduce(getattr, name.split("."), c))) for c in (saved, config))
    return ((key, old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of every setting in `value`, whose own key is `name`; entries of a list by their number."""
    if is_dataclass(value):
        for entry in fields(value):
            yield from _leaves(f"{name}.{entry.name}", getattr(value, entry.name))
    elif isinstance(value, list) and value and is_dataclass(value[0]):
        for index, entry in enumerate(value):
            yield from _leaves(f"{name}.{index}", entry)
    else:
        yield name, value
