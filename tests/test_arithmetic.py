"""Batch arithmetic is what the learner really does, and impossible sizes are refused by name."""

import pytest
import torch

from learner.arithmetic import CLIPPING, BatchError, batch_notes, describe_batch
from learner.config import LearnerConfig, OptimizerConfig, SftConfig, objective_names
from learner.objectives import CompletionBatch, resolve

DATA = {
    "prompts_per_step": 32,
    "group_size": 16,
    "steps": 100,
    "train_examples": 1000,
    "prompt_tokens": 200,
    "title_tokens": 21,
}


def test_the_published_batch():
    arithmetic = describe_batch(LearnerConfig(ranks=4), **DATA)
    assert (arithmetic.prompts, arithmetic.candidates, arithmetic.prompts_per_rank) == (32, 512, 8)
    assert arithmetic.packed_tokens == 200 + 16 * 20
    assert arithmetic.micro_batches == 2  # 8 x 520 tokens in batches of 4096
    assert (arithmetic.rl_updates, arithmetic.warmup_steps) == (100, 3)
    assert (arithmetic.sft_examples_per_rank, arithmetic.sft_updates_per_epoch) == (32, 8)
    assert "512 candidates" in arithmetic.lines()[0]


def test_passes_and_mini_batches_multiply_the_optimizer_steps():
    optimizer = OptimizerConfig(warmup_ratio=0.01)
    arithmetic = describe_batch(LearnerConfig(updates_per_batch=3, mini_batches=4, optimizer=optimizer), **DATA)
    assert (arithmetic.rl_updates, arithmetic.warmup_steps) == (1200, 12)
    assert arithmetic.prompts_per_rank == 8


def test_a_lone_update_has_no_warm_up():
    arithmetic = describe_batch(LearnerConfig(), **DATA | {"steps": 1})
    assert "1 update, 0 of learning-rate warm-up" in arithmetic.lines()[0]


def test_a_ratio_that_nothing_bounds_is_noted():
    (note,) = describe_batch(LearnerConfig(updates_per_batch=3), **DATA).lines()[2:]
    assert "learner.updates_per_batch=3 without learner.clip_low and learner.clip_high" in note
    (note,) = batch_notes(LearnerConfig(mini_batches=2))
    assert "learner.mini_batches=2 without" in note
    for config in (
        LearnerConfig(),  # its ratio is 1
        LearnerConfig(updates_per_batch=3, clip_low=0.2),
        LearnerConfig(mini_batches=2, clip_low=0.2),
        LearnerConfig(updates_per_batch=3, clip_high=0.2),
        LearnerConfig(updates_per_batch=3, objective="reinforce"),
        LearnerConfig(updates_per_batch=3, objective="my.module:objective"),
    ):
        assert batch_notes(config) == ()


def test_it_is_noted_of_the_objectives_that_clip():
    clipping = [name for name in objective_names() if "clipped" in _metrics(name)]
    assert clipping == list(CLIPPING)


def _metrics(name):
    """Names of what an objective returns beside its contributions."""
    logp = -torch.ones(2, 3)
    return resolve(name)(CompletionBatch(logp, logp < 0, torch.ones(2)), LearnerConfig())[1].keys()


def test_without_sft_nothing_is_said_about_it():
    arithmetic = describe_batch(LearnerConfig(sft=SftConfig(epochs=0)), **DATA)
    assert len(arithmetic.lines()) == 1


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LearnerConfig(ranks=64), "train.prompts_per_step=32"),
        (LearnerConfig(mini_batches=5), "learner.mini_batches=5 must divide train.prompts_per_step=32"),
        (LearnerConfig(mini_batches=16, ranks=4), "learner.mini_batches=16 .* learner.ranks=4"),
        (LearnerConfig(ranks=4, sft=SftConfig(batch_size=3)), "learner.sft.batch_size=3"),
        (LearnerConfig(micro_batch_tokens=100), "learner.micro_batch_tokens=100"),
        (LearnerConfig(offload_optimizer=True), "learner.zero_stage"),
    ],
)
def test_impossible_sizes_are_refused_by_name(config, named):
    with pytest.raises(BatchError, match=named):
        describe_batch(config, **DATA)
