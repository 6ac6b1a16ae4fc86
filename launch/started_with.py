"""Which data and catalogue an existing run was started with, wherever one asks from."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from catalog.config import DataConfig
from launch.config import Config, ConfigError

FILE = "catalogue.json"


@dataclass(frozen=True)
class StartedWith:
    """The content of a run's catalogue.json. Folders are absolute, so that a run can be asked from any folder."""

    fingerprint: str
    """Of all that the catalogue was built from."""
    cache: str
    """data.cache of the run when it was started last."""
    data: str | None
    """data.path of the run when it was started last."""

    @staticmethod
    def now(config: Config, fingerprint: str) -> "StartedWith":
        """What a run that starts in the working directory has."""
        data = config.data
        return StartedWith(fingerprint, str(Path(data.cache).resolve()), data.path and str(Path(data.path).resolve()))

    @staticmethod
    def of(config: Config) -> "StartedWith":
        """What an existing run was started with. Raises ConfigError."""
        file = Path(config.runs) / config.name / FILE
        try:
            content: dict[str, Any] = json.loads(file.read_text())
            started = StartedWith(content["fingerprint"], content.get("cache", config.data.cache), content.get("data"))
            if not all(isinstance(value, str) for value in (started.fingerprint, started.cache, started.data or "")):
                raise TypeError(started)
            return started
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file} is missing or damaged, so nobody can tell whether the run was started with the same data; "
                "start another with NAME=, or OVERWRITE=1 replaces it"
            ) from error

    def catalogue(self, data: DataConfig) -> Path | None:
        """The folder of the built catalogue; None where it is gone. data: the run's configuration of it."""
        folders = (Path(cache) / self.fingerprint for cache in (self.cache, data.cache))
        return next((folder for folder in folders if folder.is_dir()), None)

    def places(self, data: DataConfig) -> DataConfig:
        """The run's configuration of its data with the folders that are still there, to build its catalogue again."""
        cache = self.cache if Path(self.cache).is_dir() else data.cache
        path = self.data if self.data is not None and Path(self.data).is_dir() else data.path
        return replace(data, cache=cache, path=path)
