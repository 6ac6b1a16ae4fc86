"""How the policy is updated."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Packing = Literal["tree", "padded"]


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of all steps in which the rate rises from 0; rounded up to whole steps, none where there is one step."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    gradient_clipping: float = 0.3
    """Largest global gradient norm; 0 turns clipping off."""


@dataclass
class LoraConfig:
    """Low-rank adapters (peft). Merged into the weights on export."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = 16.0
    """Scale: alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Module names, or "all-linear"."""


@dataclass
class SftConfig:
    """Supervised fine-tuning on the training split, before RL."""

    epochs: int = 10
    """At most this many passes; 0 skips SFT."""
    batch_size: int = 128
    """Examples per update, over all ranks."""
    patience: int = 3
    """Epochs without a better validation loss before stopping."""
    valid_examples: int = 1000
    """Validation examples behind that loss, evenly spaced over the split; 0 takes all."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-4, gradient_clipping=1.0)
    )
    """Optimizer of SFT."""


@dataclass
class LearnerConfig:
    """Objective, packing and distribution of the policy update."""

    objective: str = "grpo"
    """A file of learner/objectives, an import path "package.module:function" or a file path "../file.py:function"."""
    clip_low: float | None = None
    """Lower clipping bound of the ratio (1 - clip_low); null does not clip."""
    clip_high: float | None = None
    """Upper clipping bound of the ratio (1 + clip_high); null does not clip."""
    beta: float = 1e-3
    """Weight of the KL term; 0 loads no reference model."""
    kl_on: Literal["all", "informative"] = "all"
    """informative: groups whose advantages are all zero are left out of the KL term, and so cost nothing."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation."""
    importance_sampling: Literal["stale", "always"] = "stale"
    """When gains are weighted by old / rollout (truncated importance sampling, TIS). stale: with train.staleness above
    0. always: also where only rounding sets rollout workers and learner apart, which in bfloat16 is felt."""
    importance_cap: float | None = 2.0
    """Largest importance weight; null does not truncate. The weight is old / rollout. That of reinforce, which has no
    ratio, is policy / rollout; without staleness, with several updates of a batch, policy / old."""
    mismatch_limit: float | None = None
    """Largest mean difference of a candidate's log-probability to that of a rollout with the same weights; beyond it
    the run ends, since its rollouts come from another policy. null: 0.1 in float32, 5 in bfloat16."""
    inclusion_weights: bool = False
    """With rollout.strategy=stochastic_beam: weigh every candidate by its inclusion weight instead of 1 / G, so that
    the mean over a group is an unbiased estimate of the mean over the policy (over titles, at temperature 1)."""
    updates_per_batch: int = 1
    """Passes over a batch of groups; an optimizer step each, or as many as it has mini-batches."""
    mini_batches: int = 1
    """Equal parts of a batch with an optimizer step each. Above 1, one more forward pass finds the old policy's
    log-probabilities before the first of these steps."""
    reference_sync_every: int = 512
    """Optimizer steps between two updates of the reference model; 0 never."""
    reference_sync_alpha: float = 0.6
    """reference = alpha * policy + (1 - alpha) * reference."""
    reference_offload: bool = False
    """Keep the reference model in host memory between uses; beside a GPU in pinned memory, which
    torch rounds up to powers of two: up to twice its size."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the RL phase."""
    packing: Packing = "tree"
    """tree: prompt once, then the trie of candidates. padded: one row per candidate, the oracle."""
    micro_batch_tokens: int = 4096
    """Packed tokens of one forward pass."""
    logit_mib: float = 256
    """Memory of the vocabulary projections that exist at once, in MiB; where one forward pass has more, the backward
    pass computes them anew."""
    ranks: int = 1
    """Data-parallel learner ranks (Ray actors)."""
    threads: int = 0
    """CPU threads per rank; 0 divides the cores by the ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and computation."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (ZeRO 1 to 3)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters instead of full weights."""
    sft: SftConfig = field(default_factory=SftConfig)
    """Supervised fine-tuning before RL."""
    sleep: bool = False
    """Give back what training has freed before workers load new weights, for devices that both use."""
    timeout_s: float = 1800.0
    """Longest wait for one call of the ranks: a step, a report of SFT, a checkpoint."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """More DeepSpeed configuration, merged over ours."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of an RL step."""
        return self.updates_per_batch * self.mini_batches


def objective_names() -> list[str]:
    """The objectives that come with the project, without importing them."""
    folder = Path(__file__).parent / "objectives"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", "base"))
