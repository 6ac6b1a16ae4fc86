"""Trackers are given what a run logs, and can neither stop it nor be forgotten when it ends."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Refused
from conftest import REPOSITORY

from launch.compose import compose, load
from launch.config import Config, ConfigError
from launch.run_directory import RunDirectory

TRACKERS = """
from pathlib import Path

class Lines:
    def __init__(self, run, config):
        self.file = run / "lines"
        self.log("config", config["train"]["seed"], {})

    def log(self, phase, step, metrics):
        with self.file.open("a") as file:
            print(phase, step, metrics, file=file)

    def close(self):
        self.log("closed", 0, {})

class Outside(Lines):
    def __init__(self, run, config):
        self.file = run.parent.parent / "outside"

class Fails(Lines):
    def log(self, phase, step, metrics):
        if phase == "train":
            metrics.clear()
            raise ConnectionError("no network")

    def close(self):
        raise AssertionError("it was left out before")

class Exits(Fails):
    def log(self, phase, step, metrics):
        if phase == "train":
            raise SystemExit("no licence")

class CannotBeMade(Lines):
    def __init__(self, run, config):
        raise PermissionError("who are you?")

def function(run, config):
    return Lines(run, config)

class NeverCloses:
    log = Lines.log

made = object.__new__(Lines)
"""


@pytest.fixture
def tracked(tmp_path: Path) -> Any:
    """The configuration of a run with some of TRACKERS."""
    (tmp_path / "trackers.py").write_text(TRACKERS)

    def configured(*names: str) -> Config:
        trackers = ",".join(f"{tmp_path}/trackers.py:{name}" for name in names)
        return compose(overrides=[f"runs={tmp_path}/runs", f"train.trackers=[{trackers}]", "train.seed=7"])

    return configured


def test_a_tracker_is_given_all_metrics(tracked: Any) -> None:
    run = RunDirectory(tracked("Lines"), "0")
    run.log("sft", 1, {"loss": 2.0})
    run.log("train", 1, {"loss": 1.0, "kl": 0.0})
    run.close()
    assert (run.path / "lines").read_text().splitlines() == [
        "config 7 {}",
        "sft 1 {'loss': 2.0}",
        "train 1 {'loss': 1.0, 'kl': 0.0}",
        "closed 0 {}",
    ]


@pytest.mark.parametrize(
    ("name", "error"), [("Fails", "ConnectionError: no network"), ("Exits", "SystemExit: no licence")]
)
def test_a_tracker_that_raises_is_left_out_and_the_others_are_not(tracked: Any, name: str, error: str) -> None:
    said: list[str] = []
    run = RunDirectory(tracked(name, "Lines"), "0", say=said.append)
    for step in (1, 2):
        run.log("train", step, {"loss": 1.0})
    run.close()
    assert len(said) == 1
    assert f"trackers.py:{name} raised and gets nothing more" in said[0]
    assert error in said[0]
    assert [line["loss"] for line in run.metrics("train", steps=2)] == [1.0, 1.0]
    assert (run.path / "lines").read_text().count("{'loss': 1.0}") == 2


def test_a_tracker_that_cannot_be_made_leaves_the_old_run_as_it_is(tracked: Any) -> None:
    old = RunDirectory(tracked(), "old")
    old.log("train", 1, {"loss": 1.0})
    old.close()
    with pytest.raises(ConfigError, match=r"CannotBeMade' could not be made:\n(?s:.*)PermissionError: who are you\?"):
        RunDirectory(tracked("Lines", "CannotBeMade"), "new", overwrite=True)
    with pytest.raises(ConfigError, match="CannotBeMade' could not be made"):
        RunDirectory(tracked("CannotBeMade"), "old", resume=True)
    assert load(old.path / "config.yaml").train.trackers == []
    assert "old" in (old.path / "catalogue.json").read_text()
    assert [line["loss"] for line in old.metrics("train", steps=1)] == [1.0]
    assert {path.name for path in old.path.parent.iterdir()} == {"default"}


def test_a_tracker_that_cannot_be_made_leaves_no_run_and_none_of_the_others_open(tmp_path: Path, tracked: Any) -> None:
    with pytest.raises(ConfigError):
        RunDirectory(tracked("Outside", "CannotBeMade"), "new")
    assert not any((tmp_path / "runs").iterdir())
    assert (tmp_path / "outside").read_text() == "closed 0 {}\n"


def test_a_run_that_is_killed_while_its_trackers_are_made_can_be_continued(tmp_path: Path) -> None:
    (tmp_path / "kills.py").write_text(
        "import os\nclass Kills:\n    log = close = print\n    def __init__(self, run, config):\n        os._exit(9)\n"
    )
    overrides = [f"runs={tmp_path}/runs", f"train.trackers=[{tmp_path}/kills.py:Kills]"]
    code = (
        "from launch.compose import compose; from launch.run_directory import RunDirectory; "
        f"RunDirectory(compose(overrides={overrides}), '0')"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert killed.returncode == 9
    RunDirectory(compose(overrides=overrides[:1]), "0", resume=True).close()


def test_what_is_no_tracker_is_refused_before_anything_starts(tmp_path: Path, tracked: Any, refused: Refused) -> None:
    tracked()
    assert "'missing.py:Wandb': there is no file" in refused("train", "train.trackers=[missing.py:Wandb]")
    for name in ("function", "Path", "NeverCloses", "made"):
        message = refused("train", f"train.trackers=[{tmp_path}/trackers.py:{name}]")
        assert f"trackers.py:{name}' must be a class with the methods log(phase, step, metrics) and close()" in message
