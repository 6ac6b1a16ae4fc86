"""The policy before training: a Hugging Face directory that exists, or a small one made for the catalogue."""

import hashlib
import json
from pathlib import Path

from catalog.atomic import atomic_folder
from launch.config import Config, ConfigError, ModelConfig
from launch.model_folder import check_model

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Of a fresh model, so that every rollout worker can run it."""


def download(name: str) -> Path:
    """The local snapshot of a model of the Hugging Face hub, fetched if need be. Raises ConfigError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.path={name}: neither a folder nor a model that the Hugging Face hub gives here ({reason}); "
            "MODEL= also takes the directory of a downloaded model"
        ) from error


def fresh_model(config: ModelConfig, texts: list[str], cache: Path) -> Path:
    """A Qwen2 from random weights with a byte-level BPE trained on `texts`, made once per configuration and texts.

    Raises ConfigError as check_shape.
    """
    check_shape(config)
    path = _fresh_path(config, texts, cache)
    if path.is_dir():
        return path
    with atomic_folder(path) as temporary:
        _write_fresh(config, texts, temporary)
    return path


def check_shape(config: ModelConfig) -> None:
    """Raise ConfigError for a fresh model of a shape that no attention kernel takes."""
    if config.hidden % config.heads or config.heads % config.kv_heads:
        raise ConfigError(
            f"model.hidden={config.hidden}, model.heads={config.heads}, model.kv_heads={config.kv_heads}: "
            "each must be a multiple of the next"
        )
    if config.hidden // config.heads not in HEAD_SIZES:
        raise ConfigError(
            f"model.hidden / model.heads = {config.hidden // config.heads}: vLLM has attention on CPUs for head sizes "
            f"{', '.join(map(str, HEAD_SIZES))}"
        )


def _fresh_path(config: ModelConfig, texts: list[str], cache: Path) -> Path:
    key = hashlib.sha256(json.dumps([vars(config), texts]).encode()).hexdigest()[:16]
    return cache / f"qwen2-{key}"


def _write_fresh(config: ModelConfig, texts: list[str], path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from catalog.byte_bpe import train_byte_bpe

    train_byte_bpe(texts, config.vocabulary, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    torch.manual_seed(config.seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=config.hidden,
            intermediate_size=config.hidden * 3,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            vocab_size=len(tokenizer),
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )
    model.save_pretrained(path)


def prepare_model(config: Config) -> Path:
    """The directory of the policy before training; checks a given one and makes a fresh one."""
    if config.model.path is not None:
        path = Path(config.model.path)
        path = path if path.is_dir() else download(config.model.path)
        check_model(path)
        return path
    from catalog.build import catalog_texts

    return fresh_model(config.model, catalog_texts(config.data), _fresh_models(config))


def find_model(config: Config) -> Path | None:
    """The directory that prepare_model would return where it is on disk already; None for one to make or to fetch."""
    if config.model.path is not None:
        path = Path(config.model.path)
        if not path.is_dir():
            return None
        check_model(path)
        return path
    from catalog.build import catalog_texts

    path = _fresh_path(config.model, catalog_texts(config.data), _fresh_models(config))
    return path if path.is_dir() else None


def _fresh_models(config: Config) -> Path:
    return Path(config.data.cache) / "models"
