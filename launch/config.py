"""The whole configuration as dataclasses, and the checks that need nothing else."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from catalog.config import DataConfig
from launch.ranges import out_of_range
from learner.config import LearnerConfig
from rewards.config import RewardTerm
from rollout.config import RolloutConfig

FIXED_IN_A_RUN = {
    "": ("data", "model", "rewards"),
    "rollout": ("strategy", "group_size", "temperature", "oversample", "logprob_space", "max_completion_tokens"),
    "learner": (
        "objective",
        "beta",
        "kl_on",
        "normalize_std",
        "clip_low",
        "clip_high",
        "importance_sampling",
        "importance_cap",
        "inclusion_weights",
        "updates_per_batch",
        "mini_batches",
        "reference_sync_every",
        "reference_sync_alpha",
        "lora",
        "optimizer",
        "sft",
    ),
    "train": ("prompts_per_step", "seed", "eval_examples", "eval_beams", "eval_ks"),
}
"""What a resumed run must have in common with its beginning."""


class ConfigError(ValueError):
    """An unknown key, a wrong type, a bad range or a missing file; the message names it and what is allowed."""


@dataclass
class ClusterConfig:
    """The machines and how actors are placed on them."""

    name: str = "local"
    """The profile: its name in configs/cluster, or the path of its file."""
    address: str = "local"
    """"local" starts a Ray of its own; "auto" or host:port joins a running cluster."""
    device: Literal["cpu", "gpu"] = "cpu"
    """What rollout workers and learner ranks run on."""
    gpus: int = 0
    """GPUs that the profile is written for, over all nodes."""
    gpus_per_node: int = 8
    """GPUs of one node; a rollout worker's devices stay on one node."""
    colocate: bool = False
    """Rollout worker i and learner rank i share a GPU and work in turn; see rollout.sleep and learner.sleep."""
    object_store_gib: float = 3.0
    """Shared memory for objects of a local Ray, in GiB; where the weights of two versions do not fit, Ray spills."""
    start_timeout_s: float = 300.0
    """Longest wait for the actors to be placed and ready."""


@dataclass
class ModelConfig:
    """The policy before training."""

    path: str | None = None
    """Hugging Face directory or hub name; null: a small Qwen2 from random weights with a tokenizer of its own."""
    vocabulary: int = 1024
    """Tokens of the trained byte-level BPE."""
    hidden: int = 128
    """Hidden size."""
    layers: int = 3
    """Number of layers."""
    heads: int = 4
    """Attention heads; vLLM on CPUs takes head sizes (hidden / heads) of 32, 64, 80, 96, 112, 128 and some above."""
    kv_heads: int = 2
    """Key and value heads."""
    seed: int = 0
    """Seed of the random weights."""


@dataclass
class TrainConfig:
    """The loop: how many steps of what size, how far apart rollouts and learner may be, and what is evaluated."""

    steps: int | None = None
    """RL steps; null: as many as `epochs` need."""
    epochs: float = 2.0
    """Passes over the training examples where `steps` is null."""
    prompts_per_step: int = 32
    """Prompts, and so groups, of one step."""
    staleness: int = 0
    """Policy versions that a rollout may be older than the learner. 0: roll out, learn, sync, repeat."""
    seed: int = 0
    """Seed of the data order, of SFT's too, of new adapters and of the sampling strategies."""
    eval_examples: int = 1000
    """Test examples evaluated before and after, evenly spaced over the split; 0: all."""
    eval_beams: int = 20
    """Width of the evaluation's beam search."""
    eval_ks: list[int] = field(default_factory=lambda: [1, 3, 5, 10])
    """Cut-offs of HR@K and NDCG@K; at most eval_beams. The gain of RL over SFT is that of NDCG at the largest."""
    eval_every: int = 0
    """Steps between evaluations on the validation split (as many examples and beams as on the test split); 0: none."""
    keep_best: bool = False
    """Keep the policy with the best validation NDCG at the largest cut-off as checkpoints/best; needs eval_every."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always has one."""
    checkpoints_kept: int = 2
    """Older checkpoints are deleted."""
    rollouts_every: int = 10
    """Steps between saved rollout samples (rollouts/*.parquet); those of the last step are saved, too."""
    trackers: list[str] = field(default_factory=list)
    """Classes that are given all metrics, too: "file.py:Name" or "package.module:Name"; see launch/trackers.py."""


@dataclass
class Config:
    """Everything a run needs; saved resolved as runs/<name>/config.yaml."""

    name: str = "default"
    """Name of the run and of its folder under `runs`."""
    runs: str = "runs"
    """Folder of all runs."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """configs/cluster/*.yaml, CLUSTER="""
    data: DataConfig = field(default_factory=DataConfig)
    """configs/data/*.yaml or a folder, DATA="""
    model: ModelConfig = field(default_factory=ModelConfig)
    """configs/model/*.yaml, a Hugging Face directory or a name of the hub, MODEL="""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Generation of groups."""
    rewards: list[RewardTerm] = field(default_factory=lambda: [RewardTerm("rule"), RewardTerm("ranking")])
    """Terms of the reward."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Update of the policy."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""


def check(config: Config) -> None:
    """Raise ConfigError for a value that cannot work, naming its key."""
    learner, rollout, train = config.learner, config.rollout, config.train
    for key, value, expectation in out_of_range(config):
        raise ConfigError(f"{key}={value}: {expectation}")
    _require(rollout.group_size > 1, "rollout.group_size", rollout.group_size, "a group needs 2 candidates or more")
    _require(rollout.oversample >= 1, "rollout.oversample", rollout.oversample, "must be 1 or more")
    _require(
        bool(train.eval_ks) and all(isinstance(k, int) and 1 <= k <= train.eval_beams for k in train.eval_ks),
        "train.eval_ks",
        train.eval_ks,
        f"each cut-off must lie between 1 and train.eval_beams ({train.eval_beams})",
    )
    _require(not train.keep_best or train.eval_every > 0, "train.keep_best", True, "needs train.eval_every above 0")
    _require(bool(config.rewards), "rewards", config.rewards, "at least one reward is needed, such as [{name: rule}]")
    plain = config.name == Path(config.name).name and config.name[:1] not in ("", ".")
    _require(plain, "name", config.name, "must be a plain folder name that does not begin with a dot")
    _require(config.name.isprintable(), "name", repr(config.name), "must be text that can be shown")
    _require(len(os.fsencode(config.name)) <= 200, "name", config.name, "is too long for the name of a folder")
    check_paths(config)
    trackers = train.trackers
    _require(len(set(trackers)) == len(trackers), "train.trackers", trackers, "names one twice; name each once")
    _require(
        learner.lora.rank == 0 or bool(learner.lora.target_modules),
        "learner.lora.target_modules",
        learner.lora.target_modules,
        "adapters (learner.lora.rank) need modules; [all-linear] names all linear layers but the head",
    )
    _require(
        not learner.inclusion_weights or rollout.strategy == "stochastic_beam",
        "learner.inclusion_weights",
        learner.inclusion_weights,
        f"only rollout.strategy=stochastic_beam has inclusion weights, this is {rollout.strategy}",
    )
    _require(
        rollout.strategy != "unconstrained" or rollout.logprob_space == "vocabulary",
        "rollout.logprob_space",
        rollout.logprob_space,
        "rollout.strategy=unconstrained leaves the title trie, so only logprob_space=vocabulary is defined",
    )
    _require(
        rollout.tensor_parallel <= config.cluster.gpus_per_node,
        "rollout.tensor_parallel",
        rollout.tensor_parallel,
        f"must fit on one node (cluster.gpus_per_node={config.cluster.gpus_per_node})",
    )
    _require(
        rollout.dtype == learner.dtype,
        "rollout.dtype",
        rollout.dtype,
        f"workers take the learner's weights as they are, and learner.dtype={learner.dtype}: set both alike",
    )
    _require(
        not config.cluster.colocate
        or (rollout.workers, rollout.tensor_parallel, train.staleness) == (learner.ranks, 1, 0),
        "cluster.colocate",
        config.cluster.colocate,
        "a rollout worker and a learner rank on each GPU, in turn, need as many rollout.workers as learner.ranks, "
        "rollout.tensor_parallel=1 and train.staleness=0",
    )


def check_paths(config: Config) -> None:
    """Raise ConfigError for folders whose names DeepSpeed and vLLM would take for patterns: other files would fit."""
    for key, path in (
        ("name", Path(config.runs, config.name)),
        ("data.cache", Path(config.data.cache)),
        ("model.path", Path(config.model.path or "")),
    ):
        whole = str(path.resolve())
        _require(
            not any(sign in whole for sign in "*?["),
            key,
            whole,
            "DeepSpeed and vLLM take *, ? and [ in a path for a pattern; rename it",
        )


def _require(holds: bool, key: str, value: Any, expectation: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={value}: {expectation}")
