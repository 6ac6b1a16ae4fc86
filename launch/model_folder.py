"""The Hugging Face directory of a model: what it must have, as far as its files tell without any library of models."""

import json
from math import prod
from pathlib import Path
from typing import Any

from launch.config import ConfigError

GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the names of classes end that generate text."""
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Of these, those that are there must be JSON objects."""
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""Files of weights; where there are any of the first kind, those of the second are not read."""
VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""Files, one of which a tokenizer has its tokens from."""


def check_model(path: Path) -> None:
    """Raise ConfigError naming what a Hugging Face directory lacks, or the file in it that is damaged."""
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ConfigError(f"model {path}: adapters alone; merge them into their model (PEFT: merge_and_unload)")
        raise ConfigError(f"model {path}: config.json is missing; MODEL= takes a Hugging Face directory")
    weights = weight_files(path)
    if not any(file.is_file() for pattern in VOCABULARIES for file in path.glob(pattern)):
        raise ConfigError(
            f"model {path}: no tokenizer in it: tokenizer.json, or else what transformers makes one of "
            "(vocab.json with merges.txt, tokenizer.model)"
        )
    settings = {name: _object(path / name) for name in SETTINGS if (path / name).is_file()}
    name = _architecture(path, settings["config.json"])
    if settings["config.json"].get("is_encoder_decoder") or not name.endswith(GENERATES):
        raise ConfigError(f"model {path}: {name} is no causal language model (such as Qwen2ForCausalLM)")
    for file in weights:
        if not file.is_file():
            raise ConfigError(f"model {path}: {file.name} is missing, or no file: fetch it again")
    parameters(path)


def architecture(path: Path) -> str:
    """The class that a Hugging Face directory names, such as Qwen2ForCausalLM. Raises ConfigError for none."""
    return _architecture(path, _object(path / "config.json"))


def weight_files(path: Path) -> list[Path]:
    """The files of the weights: those that are there and those that an index names. Raises ConfigError without any."""
    for pattern in WEIGHTS:
        files = {*path.glob(pattern)}
        for index in path.glob(f"{pattern}.index.json"):
            shards = _object(index).get("weight_map")
            if not isinstance(shards, dict):
                raise ConfigError(f"model {path}: {index.name} has no weight_map, the file of each weight")
            files |= {path / str(shard) for shard in shards.values()}
        if files:
            return sorted(files)
    raise ConfigError(f"model {path}: no weights (model.safetensors) in it")


def parameters(path: Path) -> int:
    """Weights in the safetensors files of a Hugging Face directory; 0 where it has none.

    Raises ConfigError naming a file that is none, or that is cut off.
    """
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in weight_files(path):
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, "numpy") as weights:
                total += sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"model {path}: {file.name} has no weights in it, or not all ({error}): fetch it again; what "
                "git clones without Git LFS is a pointer of some lines"
            ) from error
    return total


def _architecture(path: Path, config: dict[str, Any]) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise ConfigError(
            f'model {path}: config.json names no architecture, as "architectures": ["Qwen2ForCausalLM"] would'
        )
    return named[0]


def _object(file: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises ConfigError naming one that is something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"model {file.parent}: {file.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"model {file.parent}: {file.name} is not a JSON object, but {json.dumps(content)[:40]}")
    return content
