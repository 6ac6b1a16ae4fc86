"""Where the metrics of a run go besides its folder: experiment trackers, named in the configuration."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from catalog.own_code import OwnCodeError, find_code, traceback_below
from launch.config import ConfigError


class Tracker(Protocol):
    """What `train.trackers` names, as "path/file.py:Name" or "package.module:Name"; it lives in the driver.

    It is made once per start of a run, when all actors are up: Tracker(folder of the run, its resolved configuration).
    """

    def log(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """phase: "sft" (a step is an epoch), "train", "valid" or "test". Steps since a checkpoint may come again."""
        ...

    def close(self) -> None:
        """The run has ended, whether well or not."""
        ...


def resolve(name: str) -> Callable[[Path, dict[str, Any]], Tracker]:
    """The tracker of that name. Raises ConfigError."""
    try:
        found = find_code(name)
    except OwnCodeError as error:
        raise ConfigError(f"train.trackers: {name!r}: {error}") from error
    lacking = [method for method in ("log", "close") if not callable(getattr(found, method, None))]
    if not isinstance(found, type) or lacking:
        wanted = "a class with the methods log(phase, step, metrics) and close()"
        raise ConfigError(f"train.trackers: {name!r} must be {wanted}")
    return found


class Trackers:
    """All trackers of a run. One that raises says so once and is left out from then on: it ends no training."""

    def __init__(self, names: Sequence[str], run: Path, config: dict[str, Any], say: Callable[[str], None]) -> None:
        """Raises ConfigError where one cannot be made."""
        self._say = say
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            try:
                self._trackers[name] = resolve(name)(run, config)
            except (Exception, SystemExit) as error:
                self.close()
                raise ConfigError(
                    f"train.trackers: {name!r} could not be made:\n{traceback_below(error, __file__)}"
                ) from error

    def log(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """To all of them."""
        for name, tracker in list(self._trackers.items()):
            self._call(name, partial(tracker.log, phase, step, dict(metrics)))

    def close(self) -> None:
        for name, tracker in list(self._trackers.items()):
            self._call(name, tracker.close)

    def _call(self, name: str, method: Callable[[], None]) -> None:
        try:
            method()
        except (Exception, SystemExit) as error:
            del self._trackers[name]
            self._say(f"tracker {name} raised and gets nothing more:\n{traceback_below(error, __file__)}")
