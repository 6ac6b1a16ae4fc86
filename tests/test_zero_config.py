"""What DeepSpeed is told."""

import re

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from learner.config import LearnerConfig, OptimizerConfig
from learner.deepspeed_keys import OWNED, TOP, ZERO
from learner.zero_config import zero_config


def test_a_users_keys_are_merged_over_ours_at_any_depth():
    theirs = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    made = zero_config(LearnerConfig(zero_stage=2, deepspeed=theirs), OptimizerConfig())
    assert made["zero_optimization"]["reduce_bucket_size"] == 1000
    assert made["zero_optimization"]["stage"] == 2
    assert made["wall_clock_breakdown"] is True


def test_no_timer_of_deepspeed_waits_for_the_device_unless_asked_for():
    assert not timers(LearnerConfig()).enabled
    assert timers(LearnerConfig(deepspeed={"timers": {"throughput": {"enabled": True}}})).enabled


def timers(config):
    return DeepSpeedConfig(zero_config(config, OptimizerConfig())).timers_config


@pytest.mark.parametrize(("ranks", "on_gpu", "overlaps"), [(1, True, False), (2, True, True), (2, False, False)])
def test_communication_overlaps_where_ranks_on_gpus_communicate(monkeypatch, ranks, on_gpu, overlaps):
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    made = zero_config(LearnerConfig(zero_stage=2, ranks=ranks), OptimizerConfig())
    assert made["zero_optimization"]["overlap_comm"] is overlaps


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
        ({"zero_optimization": {"compute_grad_norm": False}}, "set learner.optimizer.gradient_clipping instead"),
        ({"bf16": {"enabled": True}}, "set learner.dtype instead"),
        ({"bfloat16": {"enabled": True}}, "set learner.dtype instead"),
    ],
)
def test_what_the_learner_decides_itself_is_refused(theirs, ours):
    with pytest.raises(ValueError, match=ours):
        zero_config(LearnerConfig(deepspeed=theirs), OptimizerConfig())


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"zero_optimisation": {}}, "zero_optimisation: DeepSpeed has no such key; did you mean zero_optimization?"),
        ({"zero_optimization": {"overlap_com": True}}, "overlap_com: DeepSpeed has no such key; did you mean overlap"),
        ({"overlap_comm": True}, "learner.deepspeed.overlap_comm: DeepSpeed has no such key"),
        ({7: True}, "learner.deepspeed.7: DeepSpeed has no such key"),
        ({"zero_optimization": True}, "zero_optimization=True must be a mapping"),
    ],
)
def test_what_deepspeed_would_pass_over_is_refused(theirs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        zero_config(LearnerConfig(deepspeed=theirs), OptimizerConfig())


class Recording(dict[str, object]):
    """Remembers which keys it was asked for."""

    asked: set[str]

    def get(self, key: str, default: object = None) -> object:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> object:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> "Recording":  # type: ignore[override]
        return self


def test_the_known_keys_are_those_that_deepspeed_reads():
    Recording.asked = set()
    DeepSpeedConfig(Recording(train_batch_size=1, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1))
    assert Recording.asked == TOP
    fields = DeepSpeedZeroConfig.model_fields
    assert {*fields, *(field.alias for field in fields.values() if field.alias)} == ZERO
    assert {name.removeprefix("zero_optimization.") for name in OWNED} <= TOP | ZERO
