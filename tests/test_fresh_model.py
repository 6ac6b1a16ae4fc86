"""The small model that is made for a catalogue: whole where the path says, or an error."""

from pathlib import Path

import pytest

from catalog.atomic import CannotWrite
from launch import model
from launch.config import ConfigError, ModelConfig
from launch.model import HEAD_SIZES, check_shape, fresh_model


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
    with pytest.raises(CannotWrite, match=rf"{path.name} cannot be written"):
        fresh_model(ModelConfig(), ["text"], tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["once", path.name]


@pytest.mark.parametrize("shape", [{"hidden": 132}, {"hidden": 160}, {"hidden": 64}, {"heads": 3}, {"kv_heads": 3}])
def test_a_shape_that_no_kernel_takes_is_refused(shape: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"model\.hidden"):
        check_shape(ModelConfig(**shape))


def test_vllm_takes_every_head_size_of_a_fresh_model() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert {*HEAD_SIZES} <= {*CPUAttentionBackend.get_supported_head_sizes()}
