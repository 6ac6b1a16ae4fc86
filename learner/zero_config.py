"""Our configuration in DeepSpeed's and AdamW's words."""

from typing import Any

import torch

from learner.config import LearnerConfig, OptimizerConfig
from learner.deepspeed_keys import check_deepspeed


def zero_config(config: LearnerConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for ours; `config.deepspeed` is merged over it, key by key."""
    communicates = config.ranks > 1 and torch.cuda.is_available()  # else a second bucket and a wait for nothing
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": communicates}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # micro-batches are explicit, see ZeroEngine.backward
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if clips_itself(config) else optimizer.gradient_clipping,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device in every forward pass and step
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.dtype == "bfloat16":
        ours["communication_data_type"] = "fp32"  # of gradients between ranks
    if config.dtype == "bfloat16" and config.zero_stage:
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    check_deepspeed(config.deepspeed)
    return _merged(ours, config.deepspeed)


def clips_itself(config: LearnerConfig) -> bool:
    """Whether ZeroEngine clips: DeepSpeed neither reports nor checks the norm of gradients that no stage owns."""
    return config.zero_stage == 0 and config.dtype == "float32"


def adamw_arguments(optimizer: OptimizerConfig) -> dict[str, Any]:
    """Keyword arguments of torch.optim.AdamW."""
    return {
        "lr": optimizer.learning_rate,
        "betas": tuple(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged
