"""DeepSpeed's keys that the learner decides itself: known, and refused, without importing DeepSpeed or torch."""

from typing import Any

OWNED = {
    "train_batch_size": "train.prompts_per_step",
    "train_micro_batch_size_per_gpu": "learner.micro_batch_tokens",
    "gradient_accumulation_steps": "learner.micro_batch_tokens",
    "gradient_clipping": "learner.optimizer.gradient_clipping",
    "optimizer": "learner.optimizer",
    "scheduler": "learner.optimizer.schedule",
    "bf16": "learner.dtype",
    "fp16": "learner.dtype",
    "zero_optimization.stage": "learner.zero_stage",
}
"""DeepSpeed's names of what the learner decides itself, and ours."""


class DeepSpeedKeyError(ValueError):
    """A key of `learner.deepspeed` that is the learner's own; the message names ours."""


def check_deepspeed(theirs: dict[str, Any]) -> None:
    """Raise DeepSpeedKeyError for a key of `learner.deepspeed` that the learner decides itself."""
    zero = theirs.get("zero_optimization")
    given = {*theirs, *(f"zero_optimization.{key}" for key in (zero if isinstance(zero, dict) else ()))}
    for name in sorted(given & OWNED.keys()):
        raise DeepSpeedKeyError(f"learner.deepspeed.{name} is the learner's own: set {OWNED[name]} instead")
