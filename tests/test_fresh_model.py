"""The small model that is made for a catalogue: whole where the path says, or an error."""

from pathlib import Path

import pytest

from launch import model
from launch.config import ModelConfig
from launch.model import fresh_model


def write_config(config: ModelConfig, texts: list[str], path: Path) -> None:
    (path / "config.json").write_text("{}")


def test_a_fresh_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_write_fresh", write_config)
    path = fresh_model(ModelConfig(), ["text"], tmp_path)
    assert [file.name for file in path.iterdir()] == ["config.json"]
    monkeypatch.setattr(model, "_write_fresh", None)
    assert fresh_model(ModelConfig(), ["text"], tmp_path) == path
    assert list(tmp_path.iterdir()) == [path]


def test_a_fresh_model_that_cannot_be_renamed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_write_fresh", write_config)
    path = fresh_model(ModelConfig(), ["text"], tmp_path / "once")
    (tmp_path / path.name).write_text("a file where the folder should be")
    with pytest.raises(NotADirectoryError):
        fresh_model(ModelConfig(), ["text"], tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["once", path.name]
