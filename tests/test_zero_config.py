"""What DeepSpeed is told."""

import pytest

from learner.config import LearnerConfig, OptimizerConfig
from learner.zero_config import zero_config


def test_a_users_keys_are_merged_over_ours_at_any_depth():
    theirs = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    made = zero_config(LearnerConfig(zero_stage=2, deepspeed=theirs), OptimizerConfig())
    assert made["zero_optimization"]["reduce_bucket_size"] == 1000
    assert made["zero_optimization"]["stage"] == 2
    assert made["wall_clock_breakdown"] is True


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_gradients_cross_ranks_in_float32(stage):
    made = zero_config(LearnerConfig(zero_stage=stage, dtype="bfloat16"), OptimizerConfig())
    assert made["communication_data_type"] == "fp32"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_gradients_accumulate_in_float32(stage):
    made = zero_config(LearnerConfig(zero_stage=stage, dtype="bfloat16"), OptimizerConfig())
    assert made["bf16"]["enabled"]
    assert made["data_types"]["grad_accum_dtype"] == "fp32"


def test_the_optimizer_is_offloaded_on_request():
    made = zero_config(LearnerConfig(zero_stage=2, offload_optimizer=True), OptimizerConfig())
    assert made["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_gradients_are_clipped_in_one_place():
    optimizer = OptimizerConfig(gradient_clipping=0.3)
    assert zero_config(LearnerConfig(zero_stage=0), optimizer)["gradient_clipping"] == 0.0
    assert zero_config(LearnerConfig(zero_stage=1), optimizer)["gradient_clipping"] == 0.3


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"gradient_clipping": 2.0}, "set learner.optimizer.gradient_clipping instead"),
        ({"zero_optimization": {"stage": 3}}, "set learner.zero_stage instead"),
        ({"bf16": {"enabled": True}}, "set learner.dtype instead"),
    ],
)
def test_what_the_learner_decides_itself_is_refused(theirs, ours):
    with pytest.raises(ValueError, match=ours):
        zero_config(LearnerConfig(deepspeed=theirs), OptimizerConfig())
