"""Progress on every kind of output."""

import io
import os
import time
from types import SimpleNamespace
from typing import NoReturn

import pytest
from rich.console import Console

from launch import progress
from launch.progress import Progress, Stage


def test_a_reader_that_has_gone_ends_a_run_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True) as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        with pytest.raises(BrokenPipeError):
            Progress().line("a line")


def test_a_terminal_that_cannot_redraw_shows_lines_as_they_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    monkeypatch.setenv("TERM", "dumb")
    with Progress().stage("train", 60) as stage:
        stage.update(7, "reward 0.21")
        assert "7/60  reward 0.21" in capsys.readouterr().out


def test_the_last_line_of_a_stage_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with Progress().stage("train", 2) as stage:
        stage.update(1)
        clock.now = progress.PLAIN_INTERVAL_S
        stage.update(2)
        clock.now += 1.0
    with Progress().stage("start") as stage:
        stage.update(detail="waiting")
        clock.now += progress.PLAIN_INTERVAL_S
        stage.update()
        clock.now += progress.PLAIN_INTERVAL_S
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert printed == ["train 2/2 [10.0 s]", "start waiting [10.0 s]", "start waiting [20.0 s]"]


def test_what_a_stage_waits_for_is_said_in_time_and_when_it_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.2)
    said = []

    def wait_in_vain(stage: Stage) -> NoReturn:
        stage.update(detail="waiting for rewards")
        time.sleep(1.0)
        said.append(capsys.readouterr().out)
        stage.update(detail="waiting for workers")
        raise TimeoutError

    with pytest.raises(TimeoutError), Progress().stage("start") as stage:
        wait_in_vain(stage)
    assert said[0].count("waiting for rewards") == 1
    assert "waiting for workers" in capsys.readouterr().out
