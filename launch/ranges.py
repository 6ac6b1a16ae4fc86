"""The range of every number of the configuration."""

from collections.abc import Callable, Iterator
from functools import reduce
from math import inf
from typing import Any

from learner.config import OptimizerConfig

POSITIVE = (
    "cluster.gpus_per_node",
    "cluster.object_store_gib",
    "cluster.start_timeout_s",
    "data.max_history",
    "data.max_prompt_tokens",
    "data.generated.items",
    "data.generated.users",
    "model.vocabulary",
    "model.hidden",
    "model.layers",
    "model.heads",
    "model.kv_heads",
    "rollout.group_size",
    "rollout.temperature",
    "rollout.oversample",
    "rollout.max_completion_tokens",
    "rollout.workers",
    "rollout.tensor_parallel",
    "rollout.kv_cache_gib",
    "rollout.max_batched_tokens",
    "rollout.groups_per_table",
    "rollout.queue_tables",
    "rollout.timeout_s",
    "learner.importance_cap",
    "learner.mismatch_limit",
    "learner.updates_per_batch",
    "learner.mini_batches",
    "learner.micro_batch_tokens",
    "learner.logit_mib",
    "learner.ranks",
    "learner.timeout_s",
    "learner.lora.alpha",
    "learner.sft.batch_size",
    "learner.sft.patience",
    "train.epochs",
    "train.prompts_per_step",
    "train.eval_beams",
    "train.checkpoint_every",
    "train.checkpoints_kept",
    "train.rollouts_every",
)
NOT_NEGATIVE = (
    "cluster.gpus",
    "rollout.threads",
    "learner.clip_high",
    "learner.beta",
    "learner.reference_sync_every",
    "learner.threads",
    "learner.lora.rank",
    "learner.sft.epochs",
    "train.eval_every",
    "learner.sft.valid_examples",
    "train.steps",
    "train.staleness",
    "train.eval_examples",
)
SEEDS = ("data.generated.seed", "model.seed", "train.seed")
FINITE = (
    "cluster.object_store_gib",
    "cluster.start_timeout_s",
    "rollout.temperature",
    "rollout.oversample",
    "rollout.kv_cache_gib",
    "rollout.timeout_s",
    "learner.beta",
    "learner.logit_mib",
    "learner.timeout_s",
    "learner.lora.alpha",
    "train.epochs",
)
SHARES = (
    "data.generated.duplicates",
    "learner.clip_low",
    "learner.reference_sync_alpha",
)
TIMES = ("cluster.start_timeout_s", "rollout.timeout_s", "learner.timeout_s")
GENERATED = ("data.generated.items", "data.generated.users")
SHARES_BELOW_1 = ("learner.lora.dropout",)
"""Keys by the range that their values lie in, where they are set."""

OPTIMIZERS = ("learner.optimizer", "learner.sft.optimizer")

Range = tuple[Callable[[float], bool], str]
ABOVE_0: Range = (lambda value: value > 0, "must be greater than 0")
NOT_INFINITE: Range = (lambda value: value < inf, "must be finite")
AT_LEAST_0: Range = (lambda value: value >= 0, "must not be negative")
A_TIME: Range = (lambda value: value <= 1e8, "must be 1e8 (three years) or less")
A_COUNT: Range = (lambda value: value <= 10**8, "must be 10^8 or less")
A_MILLION: Range = (lambda value: value <= 10**6, "must be 1,000,000 or less")
A_SEED: Range = (lambda value: 0 <= value < 2**62, "must be at least 0 and less than 2^62")
FROM_0_TO_1: Range = (lambda value: 0 <= value <= 1, "must lie between 0 and 1")
FROM_0_BELOW_1: Range = (lambda value: 0 <= value < 1, "must be at least 0 and less than 1")


def out_of_range(config: Any) -> Iterator[tuple[str, Any, str]]:
    """(key, value, what it must be) of every number of a Config that lies outside its range."""
    for keys, allowed in (
        (POSITIVE, ABOVE_0),
        (FINITE, NOT_INFINITE),
        (TIMES, A_TIME),
        (GENERATED, A_MILLION),
        (NOT_NEGATIVE, AT_LEAST_0),
        (SEEDS, A_SEED),
        (SHARES, FROM_0_TO_1),
        (SHARES_BELOW_1, FROM_0_BELOW_1),
    ):
        for key in keys:
            yield from _outside(key, _value(config, key), allowed)
    for key in (*POSITIVE, *NOT_NEGATIVE):
        if isinstance(value := _value(config, key), int):
            yield from _outside(key, value, A_COUNT)
    for key in OPTIMIZERS:
        yield from _optimizer_out_of_range(key, _value(config, key))


def _optimizer_out_of_range(key: str, optimizer: OptimizerConfig) -> Iterator[tuple[str, Any, str]]:
    for name in ("learning_rate", "eps", "weight_decay"):
        yield from _outside(f"{key}.{name}", getattr(optimizer, name), NOT_INFINITE)
    yield from _outside(f"{key}.learning_rate", optimizer.learning_rate, ABOVE_0)
    yield from _outside(f"{key}.warmup_ratio", optimizer.warmup_ratio, FROM_0_TO_1)
    for beta in optimizer.betas:
        yield from _outside(f"{key}.betas", beta, FROM_0_BELOW_1)
    yield from _outside(f"{key}.eps", optimizer.eps, ABOVE_0)
    yield from _outside(f"{key}.weight_decay", optimizer.weight_decay, AT_LEAST_0)
    yield from _outside(f"{key}.gradient_clipping", optimizer.gradient_clipping, AT_LEAST_0)


def _outside(key: str, value: float | None, allowed: Range) -> Iterator[tuple[str, Any, str]]:
    holds, expectation = allowed
    if value is not None and not holds(value):
        yield key, value, expectation


def _value(config: Any, key: str) -> Any:
    return reduce(getattr, key.split("."), config)
