"""vLLM's engine arguments, as far as they are known without an engine: which are ours, and what fits into one."""

import json
import os
from pathlib import Path
from typing import Any

from rollout.config import RolloutConfig, Strategy

LONGER = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
"""vLLM's environment variable for lengths beyond a model's positions."""
DEFAULT_MAX_MODEL_LEN = 2048
"""Most tokens of a prompt with its completion, where neither the model nor rollout.vllm.max_model_len says less."""
OWNED = {
    "model": "model.path",
    "dtype": "rollout.dtype",
    "tensor_parallel_size": "rollout.tensor_parallel",
    "pipeline_parallel_size": "rollout.tensor_parallel",
    "distributed_executor_backend": "rollout.tensor_parallel",
    "data_parallel_size": "rollout.workers",
    "kv_cache_memory_bytes": "rollout.kv_cache_gib",
    "gpu_memory_utilization": "rollout.kv_cache_gib",
    "num_gpu_blocks_override": "rollout.kv_cache_gib",
    "max_num_batched_tokens": "rollout.max_batched_tokens",
    "enable_sleep_mode": "rollout.sleep",
}
"""vLLM's names of what the project's own keys decide, and those keys."""
FIXED = {
    "skip_tokenizer_init": "prompts and titles are token ids",
    "tokenizer": "prompts and titles are token ids",
    "generation_config": "a model's sampling defaults have no effect",
    "override_generation_config": "a model's sampling defaults have no effect",
    "logits_processors": "the trie's is the only one",
    "logprobs_mode": "log-probabilities are those that the trie mask writes",
    "max_logprobs": "log-probabilities are those that the trie mask writes",
    "additional_config": "it tells the trie mask where the trie is",
    "worker_cls": "weights and searches run in a worker class of our own",
    "worker_extension_cls": "weights and searches run in a worker class of our own",
    "compilation_config": "the search needs CUDA graphs in pieces; cudagraph_capture_sizes is free",
    "quantization": "workers hold the learner's weights as they are",
    "enable_lora": "adapters come merged into the weights",
    "speculative_config": "the search decides which tokens are fed",
}
"""vLLM's names of what no key changes, and why."""


class EngineError(RuntimeError):
    """A rollout engine cannot be made, or cannot serve what it was asked; the message names the key to change."""


class LengthError(EngineError):
    """A prompt and a title that no engine of this configuration can take together."""


def check_vllm(theirs: dict[str, Any]) -> None:
    """Raise EngineError for an argument of `rollout.vllm` that the project decides itself, naming the key to set.

    Or for a max_model_len that says no number.
    """
    for name in sorted(theirs):
        if name in OWNED:
            raise EngineError(f"rollout.vllm.{name} is the project's own: set {OWNED[name]} instead")
        if name in FIXED:
            raise EngineError(f"rollout.vllm.{name} is fixed: {FIXED[name]}; leave it out")
    _stated_length(theirs)


def read_model_config(model_path: str | Path) -> dict[str, Any]:
    """The config.json of a Hugging Face directory. Raises EngineError where the model has no end-of-sequence token."""
    path = Path(model_path) / "config.json"
    model_config: dict[str, Any] = json.loads(path.read_text())
    sources = [model_config, model_config.get("text_config") or {}]
    for name in ("generation_config.json", "tokenizer_config.json"):
        other = path.with_name(name)
        sources.append(json.loads(other.read_text()) if other.is_file() else {})
    if all(source.get("eos_token_id") is None and source.get("eos_token") is None for source in sources):
        raise EngineError(
            f"{model_path}: the model has no end-of-sequence token; set eos_token_id in config.json to the token that "
            "ends a title"
        )
    return model_config


def max_model_len(model_config: dict[str, Any], config: RolloutConfig) -> int:
    """Most tokens of a prompt with its completion.

    Raises EngineError as `check_vllm`, and for more than the model has positions, where these are not scaled.
    """
    sources = (model_config, model_config.get("text_config") or {})
    known = [source.get(name) for source in sources for name in ("max_position_embeddings", "n_positions")]
    positions = min(filter(None, known), default=None)
    stated = _stated_length(config.vllm)
    if stated is None:
        return min(DEFAULT_MAX_MODEL_LEN, positions or DEFAULT_MAX_MODEL_LEN)
    scaled = any(_scales(source.get(name)) for source in sources for name in ("rope_scaling", "rope_parameters"))
    if positions and stated > positions and not scaled and os.environ.get(LONGER, "0") == "0":
        raise EngineError(
            f"rollout.vllm.max_model_len={stated}: the model has {positions} positions; lower it (with {LONGER}=1 "
            "vLLM takes more, though what a model gives there may be NaN)"
        )
    return stated


def _scales(rope: Any) -> bool:
    """Whether rotary positions, or those of some kind of layer, reach further than the model has positions."""
    if not isinstance(rope, dict):
        return False
    kind = rope.get("rope_type", rope.get("type", "default"))
    return kind != "default" or any(map(_scales, rope.values()))


def _unscaled_length(model_config: dict[str, Any]) -> int | None:
    """Tokens beyond which transformers scales all rotary positions of a batch by its longest text; None for most."""
    lengths = []
    for source in (model_config, model_config.get("text_config") or {}):
        named = [source.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
        by_kind = [rope for one in named for rope in one.values() if isinstance(rope, dict)]  # of layer
        ropes = named + by_kind
        if any(rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope") for rope in ropes):
            owners = [owner.get("original_max_position_embeddings") for owner in (source, *ropes)]
            lengths.append(next(filter(None, owners), source.get("max_position_embeddings")))
    return min(filter(None, lengths), default=None)


def _stated_length(theirs: dict[str, Any]) -> int | None:
    """rollout.vllm.max_model_len; None where it is not set."""
    if "max_model_len" not in theirs:
        return None
    length = theirs["max_model_len"]
    if type(length) is not int or length < 1:
        raise EngineError(
            f"rollout.vllm.max_model_len={length}: must be a number of tokens, 1 or more; vLLM's other forms (4k, "
            "auto, -1) are not taken, since what fits is checked before there is an engine. Leave it out for "
            f"{DEFAULT_MAX_MODEL_LEN:,}, or as many as the model has positions if these are fewer"
        )
    return length


def check_lengths(model_path: str | Path, config: RolloutConfig, prompt_tokens: int, title_tokens: int) -> None:
    """Raises LengthError where the longest prompt and the longest title do not fit into the engine together.

    EngineError where only what the unconstrained strategy may generate does not.
    """
    model_config = read_model_config(model_path)
    limit, unscaled = max_model_len(model_config, config), _unscaled_length(model_config)
    more_than_limit = f"together more than the engine's {limit}"
    if prompt_tokens + title_tokens > limit:
        raise LengthError(
            f"the longest prompt has {prompt_tokens} tokens, the longest title {title_tokens}, {more_than_limit}: "
            f"{shorter('beam')} (a model cannot take more than it has positions)"
        )
    if config.strategy == "unconstrained" and prompt_tokens + config.max_completion_tokens > limit:
        raise EngineError(
            f"the longest prompt has {prompt_tokens} tokens, completions up to {config.max_completion_tokens}, "
            f"{more_than_limit}: {shorter('unconstrained')} (a model cannot take more than it has positions)"
        )
    if unscaled is not None and prompt_tokens + title_tokens > unscaled:
        raise LengthError(
            f"the longest prompt has {prompt_tokens} tokens, the longest title {title_tokens}, together more than "
            f"{unscaled}, beyond which this model's rotary positions depend on the longest text of a batch, so that "
            "no title has a log-probability of its own: lower data.max_prompt_tokens"
        )


def shorter(strategy: Strategy) -> str:
    """What to do where a prompt and its completions are too long together."""
    of_completions = "rollout.max_completion_tokens or " if strategy == "unconstrained" else ""
    return f"lower {of_completions}data.max_prompt_tokens or raise rollout.vllm.max_model_len"
