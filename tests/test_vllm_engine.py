"""What is refused before, or while, a vLLM engine is made."""

import json
from pathlib import Path
from typing import Any

import pytest

from rollout.config import RolloutConfig
from rollout.vllm_engine import EngineError, check_lengths, create_llm


def test_too_little_memory_for_any_request_is_an_error(tiny_model_dir: Path) -> None:
    with pytest.raises(EngineError, match=r"rollout.kv_cache_gib=0.0001"):
        create_llm(tiny_model_dir, RolloutConfig(kv_cache_gib=0.0001))


def test_a_model_without_end_of_sequence_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "eos_token_id": null}')
    with pytest.raises(EngineError, match="no end-of-sequence token; set eos_token_id"):
        create_llm(tmp_path, RolloutConfig())


@pytest.mark.parametrize("model_config", [{"n_positions": 128}, {"text_config": {"max_position_embeddings": 128}}])
def test_lengths_that_do_not_fit_are_known_without_an_engine(tmp_path: Path, model_config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0, **model_config}))
    check_lengths(tmp_path, RolloutConfig(), 100, 28)
    check_lengths(tmp_path, RolloutConfig(vllm={"max_model_len": 256}), 200, 28)
    with pytest.raises(EngineError, match=r"longest prompt has 101 tokens.*engine's 128: lower data"):
        check_lengths(tmp_path, RolloutConfig(), 101, 28)
    with pytest.raises(EngineError, match="completions up to 64"):
        check_lengths(tmp_path, RolloutConfig(strategy="unconstrained", max_completion_tokens=64), 100, 28)
