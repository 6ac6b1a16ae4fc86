"""What is refused before, or while, a vLLM engine is made."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout.config import RolloutConfig, Strategy
from rollout.vllm_arguments import FIXED, OWNED, EngineError, LengthError, check_lengths, check_vllm
from rollout.vllm_engine import check_requests, create_llm
from rollout.vllm_requests import create_trie_llm


def test_too_little_memory_for_any_request_is_an_error(tiny_model_dir: Path) -> None:
    with pytest.raises(EngineError, match=r"rollout.kv_cache_gib=0.0001"):
        create_llm(tiny_model_dir, RolloutConfig(kv_cache_gib=0.0001))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["FooForCausalLM"]}, r"Model architectures \['FooForCausalLM'\] are not supported"),
        ({"num_hidden_layers": 3, "layer_types": None}, r"weights were not initialized .*model\.layers\.2\."),
    ],
)
def test_a_model_that_vllm_refuses_is_an_error_of_a_line(
    tiny_model_dir: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(EngineError, match=rf"^vLLM does not start with model {model}: .*{reason}") as error:
        create_llm(model, RolloutConfig())
    assert len(str(error.value)) < 600


def test_a_model_without_end_of_sequence_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "eos_token_id": null}')
    with pytest.raises(EngineError, match="no end-of-sequence token; set eos_token_id"):
        create_llm(tmp_path, RolloutConfig())


@pytest.mark.parametrize("model_config", [{"n_positions": 128}, {"text_config": {"max_position_embeddings": 128}}])
def test_lengths_that_do_not_fit_are_known_without_an_engine(tmp_path: Path, model_config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0, **model_config}))
    check_lengths(tmp_path, RolloutConfig(), 100, 28)
    with pytest.raises(EngineError, match=r"longest prompt has 101 tokens.*engine's 128: lower data"):
        check_lengths(tmp_path, RolloutConfig(), 101, 28)
    with pytest.raises(EngineError, match=r"completions up to 64.*128: lower rollout\.max_completion_tokens or data"):
        check_lengths(tmp_path, RolloutConfig(strategy="unconstrained", max_completion_tokens=64), 100, 28)


@pytest.mark.parametrize(
    "scaled",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear"},
                "sliding_attention": {"rope_type": "default"},
            }
        },
    ],
)
def test_more_tokens_than_positions_need_scaled_ones_or_vllms_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaled: dict[str, Any]
) -> None:
    plain = {"eos_token_id": 0, "max_position_embeddings": 128, "rope_parameters": {"rope_type": "default"}}
    longer = RolloutConfig(vllm={"max_model_len": 256})
    (tmp_path / "config.json").write_text(json.dumps({**plain, **scaled}))
    check_lengths(tmp_path, longer, 200, 28)
    (tmp_path / "config.json").write_text(json.dumps(plain))
    with pytest.raises(EngineError, match=r"rollout\.vllm\.max_model_len=256: the model has 128 positions; lower it"):
        check_lengths(tmp_path, longer, 200, 28)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    check_lengths(tmp_path, longer, 200, 28)


@pytest.mark.parametrize(
    "model_config",
    [
        {"max_position_embeddings": 128, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"original_max_position_embeddings": 128, "rope_parameters": {"rope_type": "longrope"}},
        {
            "text_config": {
                "rope_parameters": {"full_attention": {"rope_type": "dynamic"}},
                "max_position_embeddings": 128,
            }
        },
    ],
)
def test_lengths_at_which_positions_depend_on_the_batch_are_refused(
    tmp_path: Path, model_config: dict[str, Any]
) -> None:
    longer = {"max_position_embeddings": 512} | model_config
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0} | longer))
    config = RolloutConfig(vllm={"max_model_len": 256})
    check_lengths(tmp_path, config, 100, 28)
    with pytest.raises(LengthError, match=r"than 128, beyond which.*lower data\.max_prompt_tokens"):
        check_lengths(tmp_path, config, 101, 28)


def test_a_prompt_too_long_for_an_engine_names_what_to_lower() -> None:
    def check(strategy: Strategy) -> None:
        check_requests([np.zeros(101, np.int32)], [0], strategy, longest=28, vocab_size=9, max_model_len=128)

    with pytest.raises(EngineError, match=r"limit is 128: lower data\.max_prompt_tokens or raise"):
        check("beam")
    with pytest.raises(EngineError, match=r"128: lower rollout\.max_completion_tokens or data\.max_prompt_tokens or"):
        check("unconstrained")


@pytest.mark.parametrize("length", ["4k", "auto", "4096", -1, 0, None, True, 2.5])
def test_a_length_that_is_no_number_of_tokens_is_refused(tmp_path: Path, length: Any) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    with pytest.raises(EngineError, match=rf"rollout\.vllm\.max_model_len={length}: must be a number of tokens"):
        check_lengths(tmp_path, RolloutConfig(vllm={"max_model_len": length}), 100, 28)
    with pytest.raises(EngineError, match="max_model_len"):
        check_vllm({"max_model_len": length})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("dtype", "set rollout.dtype instead"),
        ("kv_cache_memory_bytes", "set rollout.kv_cache_gib instead"),
        ("logits_processors", "is fixed: the trie's is the only one; leave it out"),
    ],
)
def test_what_the_project_decides_is_not_passed_on(tiny_model_dir: Path, argument: str, message: str) -> None:
    with pytest.raises(EngineError, match=f"rollout.vllm.{argument} .*{message}"):
        create_llm(tiny_model_dir, RolloutConfig(vllm={argument: 1}))


def test_whatever_an_engine_is_given_by_us_is_known_as_ours(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what a user may well set: lengths, numbers of rows, kernels and graphs."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("vllm.LLM", lambda model, **arguments: given.update(arguments))
    create_trie_llm(tiny_model_dir, tiny_model_dir, RolloutConfig(tensor_parallel=2))
    free = {"max_model_len", "max_num_seqs", "enforce_eager", "block_size", "ir_op_priority", "disable_log_stats"}
    assert given.keys() >= {"dtype", "logits_processors", "worker_extension_cls"}
    assert given.keys() - OWNED.keys() - FIXED.keys() <= free


def test_an_argument_that_vllm_does_not_have_is_named(tiny_model_dir: Path) -> None:
    with pytest.raises(EngineError, match=r"vllm\.enforce_eagr: vLLM has no such.*did you mean enforce_eager"):
        create_llm(tiny_model_dir, RolloutConfig(kv_cache_gib=0.05, vllm={"enforce_eagr": True}))


def test_what_a_gpu_engine_is_given_is_known_to_vllm() -> None:
    from vllm import EngineArgs

    from rollout.worker_engine import gpu_arguments

    arguments = gpu_arguments(RolloutConfig(max_batched_tokens=1000))
    assert arguments["cudagraph_capture_sizes"][-1] == 768
    assert arguments.keys() <= {field.name for field in fields(EngineArgs)}
    assert "cudagraph_capture_sizes" not in gpu_arguments(RolloutConfig(vllm={"max_cudagraph_capture_size": 512}))
