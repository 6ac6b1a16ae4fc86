"""What tests share: one Ray, one tiny model, the data beside the repository."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from catalog.catalog import Catalog

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["command_line", "engine_fixtures"]

settings.register_profile("rere", deadline=None)  # a busy machine is no failure
settings.load_profile("rere")

REPOSITORY = Path(__file__).resolve().parent.parent
TINY_TEXTS = ["Acme Steel Bolt, 3 inch, Pack of 10", "Acme Steel Nut, 3 inch", "Bora Copper Wire 12 AWG, 100 ft"]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data and golden data; they may not be redistributed, so they are absent elsewhere."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip("the folder ../shared with real and golden data is absent; it may not be redistributed")
    return path


@pytest.fixture(scope="session")
def golden_dir(shared_dir: Path) -> Path:
    """What the published code computed on a tiny model."""
    return shared_dir / "golden"


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 tokens."""
    from catalog.byte_bpe import train_byte_bpe

    path = tmp_path_factory.mktemp("tokenizer")
    train_byte_bpe(TINY_TEXTS * 20, 400, path)
    return path


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of two layers with head size 32, float32, with the tiny tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def small_catalog(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> "Catalog":
    """200 generated items and 120 users, in the tokens of the tiny tokenizer."""
    from catalog.build import build_catalog
    from catalog.config import DataConfig, GeneratedConfig

    data = DataConfig(cache=str(tmp_path_factory.mktemp("catalog")), generated=GeneratedConfig(items=200, users=120))
    return build_catalog(data, str(tiny_tokenizer_dir))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One small Ray for all tests that need actors."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=512 * 2**20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()
