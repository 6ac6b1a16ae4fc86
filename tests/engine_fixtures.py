"""Engines that tests share, with the titles, prompts and model that they generate from.

Engines live as long as the tests of a file: vLLM's shutdown takes the process groups of all engines of a process with
it, so none may outlive the file that another one ends in.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from engine_oracle import NODE_LOGPROBS

    from catalog.trie import Trie


@pytest.fixture(scope="session")
def trie(tiny_tokenizer_dir: Path) -> "Trie":
    """70 titles with shared beginnings, forced chains, and titles that are beginnings of others."""
    from engine_oracle import VOCABULARY
    from search_oracle import random_titles
    from transformers import AutoTokenizer

    from catalog.trie import Trie

    eos = int(AutoTokenizer.from_pretrained(tiny_tokenizer_dir).eos_token_id)
    used = [token for token in range(1, VOCABULARY) if token != eos]
    titles = [[*(used[token] for token in title[:-1]), eos] for title in random_titles(1, 60, 40, 12)]
    return Trie.from_titles(titles, eos_token=eos, tokenizer_fingerprint="none")


@pytest.fixture(scope="session")
def trie_path(trie: "Trie", tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trie") / "trie.arrow"
    trie.save(path)
    return path


@pytest.fixture(scope="session")
def model(tiny_model_dir: Path) -> Any:
    """What the engines hold, in Hugging Face's hands."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    from engine_oracle import ragged_prompts

    return ragged_prompts(64)


@pytest.fixture(scope="session")
def node_logprobs(model: Any, trie: "Trie", prompts: list[list[int]]) -> "list[NODE_LOGPROBS]":
    """token_logprobs of all prompts."""
    from engine_oracle import token_logprobs

    return [token_logprobs(model, trie, prompt) for prompt in prompts]


@pytest.fixture(scope="session")
def opinionated_model_dir(tiny_model_dir: Path, trie: "Trie", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with defaults that would ruin every search and every sample: all titles begin with an end."""
    path = tmp_path_factory.mktemp("opinionated") / "model"
    shutil.copytree(tiny_model_dir, path)
    defaults = {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "repetition_penalty": 5.0}
    defaults["eos_token_id"] = [trie.eos_token, *trie.children(0)[0].tolist()]
    (path / "generation_config.json").write_text(json.dumps(defaults))
    return path


def engine_of(model_dir: Path, trie_path: Path, **settings: Any) -> Any:
    from rollout.config import RolloutConfig
    from rollout.engines import create_engine

    config = RolloutConfig(kv_cache_gib=0.05, max_batched_tokens=1024, **settings)
    return create_engine(model_dir, trie_path, config)


@pytest.fixture(scope="module")
def worker_engine(tiny_model_dir: Path, trie_path: Path) -> Iterator[Any]:
    engine = engine_of(tiny_model_dir, trie_path)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def requests_engine(opinionated_model_dir: Path, trie_path: Path) -> Iterator[Any]:
    engine = engine_of(opinionated_model_dir, trie_path, engine="requests", max_completion_tokens=12)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def trie_space_engine(opinionated_model_dir: Path, trie_path: Path) -> Iterator[Any]:
    """Log-probabilities renormalised over the trie, samples at temperature 2."""
    engine = engine_of(opinionated_model_dir, trie_path, engine="requests", logprob_space="trie", temperature=2.0)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def bf16_engine(tiny_model_dir: Path, trie_path: Path) -> Iterator[Any]:
    engine = engine_of(tiny_model_dir, trie_path, engine="requests", dtype="bfloat16")
    yield engine
    engine.shutdown()
