"""A model folder that lacks something, or is damaged, is refused before anything starts, with the file at fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Refused

from launch.config import ConfigError
from launch.model_folder import check_model, parameters

Change = Callable[[Path], object]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def written(name: str, content: str | bytes) -> Change:
    return lambda model: (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def without(*names: str) -> Change:
    return lambda model: [(model / name).unlink() for name in names]


def a_folder(name: str) -> Change:
    return lambda model: ((model / name).unlink(), (model / name).mkdir())


def a_link(name: str, to: str) -> Change:
    return lambda model: ((model / name).unlink(), (model / name).symlink_to(to))


def with_config(**changes: Any) -> Change:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return change


def sharded(index: Any) -> Change:
    def change(model: Path) -> None:
        (model / "model.safetensors").rename(model / SHARDS[0])
        (model / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("tokenizer.json"), "no tokenizer in it: tokenizer.json, or else"),
        (without("tokenizer.json", "tokenizer_config.json"), "no tokenizer in it: tokenizer.json, or else"),
        (a_folder("tokenizer.json"), "no tokenizer in it: tokenizer.json, or else"),
        (a_link("tokenizer.json", "nowhere"), "no tokenizer in it: tokenizer.json, or else"),
        (written("tokenizer.json", "[]"), "tokenizer.json is not a JSON object, but []"),
        (written("tokenizer.json", '{"model": '), "tokenizer.json is not JSON: Expecting value"),
        (written("tokenizer_config.json", "[]"), "tokenizer_config.json is not a JSON object, but []"),
        (written("generation_config.json", "{"), "generation_config.json is not JSON: Expecting property name"),
        (written("config.json", "[]"), "config.json is not a JSON object, but []"),
        (written("config.json", "null"), "config.json is not a JSON object, but null"),
        (written("config.json", b"\xff\xfe\x00{"), "config.json is not JSON: 'utf-8' codec can't decode"),
        (written("config.json", "[" * 100_000), "config.json is not JSON: maximum recursion depth"),
        (with_config(architectures=[None]), "config.json names no architecture"),
        (with_config(architectures=5), "config.json names no architecture"),
        (with_config(architectures="Qwen2ForCausalLM"), "config.json names no architecture"),
        (without("model.safetensors"), "no weights (model.safetensors) in it"),
        (a_folder("model.safetensors"), "model.safetensors is missing, or no file"),
        (a_link("model.safetensors", "nowhere"), "model.safetensors is missing, or no file"),
        (a_link("model.safetensors", "model.safetensors"), "model.safetensors is missing, or no file"),
        (sharded({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}), f"{SHARDS[1]} is missing, or no file"),
        (sharded({"weight_map": list(SHARDS)}), "model.safetensors.index.json has no weight_map"),
        (sharded("{"), "model.safetensors.index.json is not JSON"),
    ],
)
def test_what_is_wrong_with_a_model_is_said_in_a_line(
    model: Path, tmp_path: Path, refused: Refused, change: Change, reason: str
) -> None:
    change(model)
    assert f"error: model {model}: {reason}" in refused("train", "--dry-run", "--model", str(model))


@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("tokenizer.model",), ("vocab.txt",)])
def test_a_tokenizer_may_be_in_other_files(model: Path, files: tuple[str, ...]) -> None:
    (model / "tokenizer.json").unlink()
    for name in files:
        (model / name).touch()
    check_model(model)


def test_weights_may_be_in_several_files(model: Path) -> None:
    whole = parameters(model)
    sharded({"weight_map": {"a": SHARDS[0]}})(model)
    check_model(model)
    assert parameters(model) == whole > 0


def test_weights_of_pytorch_are_not_counted(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    check_model(model)
    assert parameters(model) == 0
    (model / "pytorch_model.bin").rename(model / "weights.bin")
    with pytest.raises(ConfigError, match="no weights"):
        check_model(model)
