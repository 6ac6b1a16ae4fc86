"""Progress on every kind of output."""

import io
import os

import pytest
from rich.console import Console

from launch import progress
from launch.progress import Progress


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
