"""The arithmetic of a batch, printed and checked before anything starts."""

import math
from dataclasses import dataclass

from learner.config import LearnerConfig
from learner.schedule import warmup_steps

CLIPPING = ("dapo", "grpo", "gspo", "rank_grpo")
"""Objectives whose ratio learner.clip_low and learner.clip_high bound; those of people's own are not known."""


class BatchError(ValueError):
    """Batch sizes that cannot work together; the message names the keys."""


@dataclass(frozen=True)
class BatchArithmetic:
    """What one optimizer step of RL and of SFT consists of."""

    prompts: int
    """Groups per step, over all ranks."""
    candidates: int
    """Candidates per step: prompts x group size."""
    prompts_per_rank: int
    """The largest share of a rank, of an update."""
    packed_tokens: int
    """Upper bound of the tokens of one group in the learner's packing."""
    micro_batches: int
    """Estimated micro-batches (gradient accumulation) per rank and update."""
    rl_updates: int
    """Optimizer steps of the whole RL phase."""
    warmup_steps: int
    sft_examples_per_rank: int
    sft_updates_per_epoch: int
    notes: tuple[str, ...] = ()
    """See batch_notes."""

    def lines(self) -> list[str]:
        """Readable lines for the start of a run."""
        rl = (
            f"RL: {_count(self.prompts, 'prompt')} -> {self.candidates} candidates per step, "
            f"{_count(self.prompts_per_rank, 'prompt')} per rank and update in about "
            f"{_count(self.micro_batches, 'micro-batch', 'es')} of groups of up to {self.packed_tokens} tokens; "
            f"{_count(self.rl_updates, 'update')}, {self.warmup_steps} of learning-rate warm-up"
        )
        sft = (
            f"SFT: {_count(self.sft_examples_per_rank, 'example')} per rank and update, "
            f"{_count(self.sft_updates_per_epoch, 'update')} per epoch"
        )
        return [rl, *([sft] if self.sft_updates_per_epoch else []), *self.notes]


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def check_batch(config: LearnerConfig, prompts_per_step: int) -> None:
    """Raise BatchError for sizes that cannot work together whatever the data, naming the configuration keys."""
    if prompts_per_step < config.ranks:
        raise BatchError(
            f"train.prompts_per_step={prompts_per_step} gives some of learner.ranks={config.ranks} no group: "
            "raise the one or lower the other"
        )
    if prompts_per_step % config.mini_batches or prompts_per_step < config.ranks * config.mini_batches:
        raise BatchError(
            f"learner.mini_batches={config.mini_batches} must divide train.prompts_per_step={prompts_per_step} into "
            f"parts with a group for each of learner.ranks={config.ranks}"
        )
    if config.sft.epochs and config.sft.batch_size < config.ranks:
        raise BatchError(
            f"learner.sft.batch_size={config.sft.batch_size} is smaller than learner.ranks={config.ranks}: "
            "raise the one or lower the other"
        )
    if config.zero_stage == 0 and config.offload_optimizer:
        raise BatchError("learner.offload_optimizer needs learner.zero_stage of 1, 2 or 3")


def batch_notes(config: LearnerConfig) -> tuple[str, ...]:
    """What works but is seldom meant, in a line each."""
    several = [name for name in ("updates_per_batch", "mini_batches") if getattr(config, name) > 1]
    if several and config.clip_low is None and config.clip_high is None and config.objective in CLIPPING:
        keys = " and ".join(f"learner.{name}={getattr(config, name)}" for name in several)
        return (
            f"note: {keys} without learner.clip_low and learner.clip_high: nothing bounds the ratio to the policy "
            "before a batch's first update",
        )
    return ()


def describe_batch(
    config: LearnerConfig,
    *,
    prompts_per_step: int,
    group_size: int,
    steps: int,
    train_examples: int,
    prompt_tokens: int,
    title_tokens: int,
) -> BatchArithmetic:
    """Check the batch arithmetic of a run and return it.

    prompt_tokens, title_tokens: the longest of the data. Raises BatchError naming the configuration keys where ranks
    would have nothing to do, or where one prompt with one title exceeds the token budget of a micro-batch. (A group
    may exceed it: it gets a micro-batch of its own.)
    """
    check_batch(config, prompts_per_step)
    if config.packing == "tree":
        group_tokens = prompt_tokens + group_size * max(0, title_tokens - 1)
    else:
        group_tokens = group_size * (prompt_tokens + title_tokens)
    smallest = prompt_tokens + title_tokens
    if smallest > config.micro_batch_tokens:
        raise BatchError(
            f"learner.micro_batch_tokens={config.micro_batch_tokens} is less than one prompt with one title "
            f"({prompt_tokens} + {title_tokens} tokens): raise it, or lower data.max_prompt_tokens"
        )
    per_rank = math.ceil(prompts_per_step // config.mini_batches / config.ranks)
    updates = steps * config.updates_per_step
    return BatchArithmetic(
        prompts=prompts_per_step,
        candidates=prompts_per_step * group_size,
        prompts_per_rank=per_rank,
        packed_tokens=group_tokens,
        micro_batches=math.ceil(per_rank * group_tokens / max(config.micro_batch_tokens, group_tokens)),
        rl_updates=updates,
        warmup_steps=warmup_steps(config.optimizer, updates),
        sft_examples_per_rank=math.ceil(config.sft.batch_size / config.ranks) if config.sft.epochs else 0,
        sft_updates_per_epoch=math.ceil(train_examples / config.sft.batch_size) if config.sft.epochs else 0,
        notes=batch_notes(config),
    )
