"""The policy of a run, asked without the run: one of its checkpoints in an engine of this process."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from catalog.build import build_catalog
from catalog.catalog import Catalog
from launch.compose import load
from launch.config import Config, ConfigError, check_paths
from launch.run_directory import RunDirectory
from launch.started_with import StartedWith
from learner import checkpoint
from rollout.config import RolloutConfig
from rollout.engine import RolloutEngine
from rollout.engines import create_engine


@dataclass(frozen=True)
class PolicyOfRun:
    """A checkpoint of a run, with what it takes to ask it."""

    config: Config
    checkpoint: Path
    catalog: Catalog

    @staticmethod
    def of(run: Path, name: str | None = None) -> "PolicyOfRun":
        """name: of one of the run's checkpoints, such as step-40, sft or best; by default the newest.

        Raises ConfigError, CheckpointError or CatalogError naming what of the run is missing or damaged.
        """
        if not run.is_dir():
            raise ConfigError(f"run {run} does not exist")
        config = replace(load(run / "config.yaml"), name=run.resolve().name, runs=str(run.resolve().parent))
        check_paths(config)
        path = _intact(run / "checkpoints", name)
        return PolicyOfRun(config, path, catalogue(config, path))

    @contextmanager
    def engine(self, rollout: RolloutConfig) -> Iterator[RolloutEngine]:
        """An engine that holds the policy's weights; what libraries say meanwhile is shown only where it fails."""
        with _errors_only():
            engine = create_engine(self.checkpoint, self.catalog.path / "trie.arrow", rollout)
        try:
            yield engine
        finally:
            engine.shutdown()


def catalogue(config: Config, tokenizer_path: Path) -> Catalog:
    """The one that the run was started with: in the run's cache, or else built again of the run's data.

    Raises ConfigError where neither gives it, and CatalogError.
    """
    started = StartedWith.of(config)
    if (folder := started.catalogue(config.data)) is not None:
        return Catalog.load(folder)
    catalog = build_catalog(started.places(config.data), str(tokenizer_path))
    RunDirectory.check_catalogue(config, catalog.fingerprint)
    return catalog


def _intact(folder: Path, name: str | None) -> Path:
    """A checkpoint that can be read."""
    there = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    path = checkpoint.newest(folder) if name is None else folder / name
    if path is None or not there:
        raise ConfigError(f"{folder} has no checkpoint yet: there is no policy to ask")
    if name is not None and name not in there:
        raise ConfigError(f"{folder} has no {name}, only {', '.join(there)}")
    if fault := checkpoint.find_fault(path):
        intact = [other for other in there if checkpoint.find_fault(folder / other) is None]
        offer = f"intact, for --checkpoint, {'is' if len(intact) == 1 else 'are'} {', '.join(intact)}"
        raise checkpoint.CheckpointError(f"checkpoint {path}: {fault}; {offer if intact else 'no other is intact'}")
    return path


@contextmanager
def _errors_only() -> Iterator[None]:
    """What libraries write to the error stream is shown only where they fail."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            log.seek(0)
            os.write(kept, log.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
