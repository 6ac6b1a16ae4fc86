"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

import math

from learner.config import OptimizerConfig


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """Steps in which the rate rises from 0: warmup_ratio of all steps, rounded up as in Hugging Face's Trainer.

    A lone step has none. That departs from Hugging Face only where it would train nothing: the first rate of a
    warm-up is 0.
    """
    return math.ceil(config.warmup_ratio * total_steps) if total_steps > 1 else 0


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (the first is 0) out of `total_steps`.

    The shapes are those of transformers.get_scheduler: with one warm-up step the first rate is 0.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    match config.schedule:
        case "cosine":
            return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear":
            return config.learning_rate * (1.0 - progress)
        case "constant":
            return config.learning_rate
