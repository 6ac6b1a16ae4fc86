"""Creates the vLLM engine that both rollout engines drive."""

import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from catalog.trie import Trie
from rollout.config import RolloutConfig, Strategy
from rollout.host_memory import return_freed_memory
from rollout.imports import collector_at_rest
from rollout.vllm_arguments import EngineError, check_vllm, max_model_len, read_model_config, shorter
from rollout.vllm_kernels import OP_PRIORITY, register_kernels

if TYPE_CHECKING:
    from vllm import LLM

CPU_BLOCK_SIZE = 32
LONGEST_REASON = 300
"""Characters of what vLLM says of a model."""
WORKER_EXTENSION = "rollout.vllm_worker.SearchWorker"
"""Methods of every vLLM worker; the requests engine only loads weights by it. vLLM extends its worker class once per
process, so both engines name the same."""


def check_requests(
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    strategy: Strategy,
    longest: int,
    vocab_size: int,
    max_model_len: int,
) -> None:
    """Raises EngineError for prompts that an engine cannot take. longest: tokens of a completion."""
    if len(seeds) != len(prompts):
        raise EngineError(f"{len(prompts)} prompts came with {len(seeds)} seeds: every prompt needs one")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise EngineError(f"prompt {i} has no tokens")
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise EngineError(
                f"prompt {i} has token ids from {prompt.min()} to {prompt.max()}, the model's vocabulary is "
                f"{vocab_size}: it was tokenized for another model"
            )
        if len(prompt) + longest > max_model_len:
            raise EngineError(
                f"prompt {i} has {len(prompt)} tokens and its completions up to {longest}, the engine's limit is "
                f"{max_model_len}: {shorter(strategy)}"
            )


def check_vocabulary(trie_path: str | Path, trie: Trie, vocab_size: int) -> None:
    """Raises EngineError for a trie of tokens that the model does not have."""
    if int(trie.edge_token.max()) >= vocab_size:
        raise EngineError(
            f"{trie_path} has token {trie.edge_token.max()}, the model's vocabulary is {vocab_size}: build the "
            "catalogue with the model's tokenizer"
        )


def check_strategy(strategy: str, size: int) -> None:
    """Raises EngineError for a strategy that there is not, or for a group of nothing."""
    if strategy not in get_args(Strategy):
        raise EngineError(f"rollout.strategy={strategy}: choose one of {', '.join(get_args(Strategy))}")
    if size < 1:
        raise EngineError(f"rollout.group_size={size}: a group needs a candidate")


def check_temperature(strategy: Strategy, temperature: float) -> None:
    """Raises EngineError where samples are to be drawn at a temperature that has no distribution."""
    if strategy != "beam" and not 0 < temperature < math.inf:
        needed = "a sample needs a temperature above 0 and below infinity"
        raise EngineError(f"rollout.temperature={temperature}: {needed}")


def create_llm(
    model_path: str | Path,
    config: RolloutConfig,
    *,
    worker_extension: str | None = None,
    logits_processors: Sequence[str | type] = (),
    first_runner: bool = False,
    **overrides: Any,
) -> "LLM":
    """A synchronous vLLM engine on this process's devices, without a tokenizer: prompts and titles are token ids.

    worker_extension: "module.Class" whose methods `llm.collective_rpc` may call on every worker. first_runner: use
    Model Runner V1 also where V2 is the default. overrides: further engine arguments; `config.vllm` wins over them.
    Sampling defaults of the model's generation_config are ignored.
    Raises EngineError for a model without an end-of-sequence token or that vLLM refuses, too little KV cache memory,
    or an argument in `config.vllm` that the project decides itself.
    """
    check_vllm(config.vllm)
    model_config = read_model_config(model_path)
    on_gpu = torch.cuda.is_available()
    _set_environment(on_gpu, first_runner)
    with collector_at_rest():
        from vllm import LLM

    if not on_gpu:
        register_kernels()
    arguments: dict[str, Any] = {
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel,
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
        "max_num_batched_tokens": config.max_batched_tokens,
        "max_num_seqs": min(1024, config.max_batched_tokens),
        "max_model_len": max_model_len(model_config, config),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "enforce_eager": not on_gpu,
        "logits_processors": list(logits_processors) or None,
        "worker_extension_cls": worker_extension or "",
        # else vLLM would ask Ray for devices beside those that this process was given
        **({"distributed_executor_backend": "mp"} if config.tensor_parallel > 1 else {}),
        **(_gpu_arguments(config) if on_gpu else _cpu_arguments()),
        **overrides,
        **config.vllm,
    }
    try:
        llm = LLM(str(model_path), **arguments)
    except TypeError as error:
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
            raise EngineError(f"rollout.vllm.{unknown[1]}: {_unknown_argument(unknown[1])}") from error
        raise
    except ValueError as error:
        if "memory" in (told := str(error).lower()) and ("kv" in told or "cache blocks" in told):
            reason = str(error).split(" Try ")[0]
            raise EngineError(
                f"rollout.kv_cache_gib={config.kv_cache_gib} is wrong here: {reason} Change rollout.kv_cache_gib or "
                f"rollout.vllm.max_model_len (now {arguments['max_model_len']})"
            ) from error
        raise EngineError(f"vLLM does not start with model {model_path}: {_reason(error)}") from error
    if not on_gpu:
        return_freed_memory()
    return llm


def call_workers(llm: "LLM", method: str, *arguments: Any) -> list[Any]:
    """What a method of every worker returns. Raises what it raised; an EngineError if in a process of its own."""
    try:
        return llm.collective_rpc(method, args=arguments)
    except RuntimeError as error:
        if (told := re.fullmatch("Worker failed with error '(.*)', please check the.*", str(error), re.S)) is None:
            raise
        raise EngineError(told[1]) from error


def has_died(llm: "LLM") -> bool:
    """Whether a worker that is a process of its own, as with tensor parallelism, has ended."""
    executor: Any = llm.llm_engine.model_executor
    workers = getattr(executor, "workers", None) or ()
    return getattr(executor, "is_failed", False) or not all(worker.proc.is_alive() for worker in workers)


def _reason(error: ValueError) -> str:
    """What vLLM says in a line, without the lists of all that it would take."""
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def _unknown_argument(name: str) -> str:
    from vllm import EngineArgs

    near = difflib.get_close_matches(name, [field.name for field in fields(EngineArgs)], n=3)
    return "vLLM has no such argument" + (f"; did you mean {' or '.join(near)}?" if near else "")


def _cpu_arguments() -> dict[str, Any]:
    return {"block_size": CPU_BLOCK_SIZE, "ir_op_priority": OP_PRIORITY}


def _gpu_arguments(config: RolloutConfig) -> dict[str, Any]:
    return {
        "enable_sleep_mode": config.sleep,
        "gpu_memory_utilization": 0.05,  # only has to be free: kv_cache_memory_bytes decides what is taken
    }


def _set_environment(on_gpu: bool, first_runner: bool) -> None:
    """vLLM reads its settings from the environment, some at import; what the user has set stays."""
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # of 5 that it waits before it ends ranks, which do not end alone
    }
    if on_gpu:
        defaults["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # nobody samples with it, and it wants a CUDA compiler
        defaults["TRITON_F32_DEFAULT"] = "ieee"  # float32 attention would multiply in TF32
    else:
        defaults["TORCHDYNAMO_DISABLE"] = "1"
        defaults["VLLM_CPU_ATTN_SPLIT_KV"] = "0"  # to share rows among threads costs a tenth of a rollout
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if first_runner:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
