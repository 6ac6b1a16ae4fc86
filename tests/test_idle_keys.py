"""Keys that were set in vain are noted, and no others."""

import pytest

from launch.compose import compose
from launch.idle_keys import NEEDS, idle_keys

CASES = [
    ("rollout.temperature=2", "a rollout.strategy that samples", "rollout.strategy=sample"),
    ("rollout.oversample=3", "rollout.strategy=dynamic", "rollout.strategy=dynamic"),
    ("rollout.max_completion_tokens=9", "rollout.strategy=unconstrained", "rollout.strategy=unconstrained"),
    ("learner.kl_on=informative", "learner.beta above 0", "learner.beta=0.1"),
    ("learner.reference_sync_every=1", "learner.beta above 0", "learner.beta=0.1"),
    ("learner.reference_sync_alpha=0.5", "learner.beta above 0", "learner.beta=0.1"),
    ("learner.reference_offload=true", "learner.beta above 0", "learner.beta=0.1"),
    ("learner.clip_low=0.2", "an objective that clips and several", "learner.updates_per_batch=2"),
    ("learner.clip_high=0.2", "an objective that clips and several", "learner.objective=mine.py:clipless"),
    ("learner.lora.alpha=3", "learner.lora.rank above 0", "learner.lora.rank=4"),
    ("learner.lora.dropout=0.5", "learner.lora.rank above 0", "learner.lora.rank=4"),
    ("learner.lora.target_modules=[q_proj]", "learner.lora.rank above 0", "learner.lora.rank=4"),
]


@pytest.mark.parametrize(("override", "needed", "helps"), CASES)
def test_a_key_that_can_do_nothing_is_noted_until_it_can(override: str, needed: str, helps: str) -> None:
    key = override.partition("=")[0]
    without = ["learner.beta=0"] if needed == "learner.beta above 0" else []
    (note,) = idle_keys(compose(overrides=[*without, override]))
    assert note.startswith(f"note: {key}=")
    assert f"has no effect without {needed}" in note
    assert idle_keys(compose(overrides=[override, helps])) == []


def test_every_idle_key_is_tried() -> None:
    assert {override.partition("=")[0] for override, *_ in CASES} == {key for keys, *_ in NEEDS for key in keys}


@pytest.mark.parametrize("cluster", ["local", "1xGPU", "8xA100"])
@pytest.mark.parametrize("algorithm", ["rere", "dapo", "gspo", "rank-grpo", "grpo-sampling"])
def test_no_profile_or_algorithm_sets_a_key_in_vain(cluster: str, algorithm: str) -> None:
    assert idle_keys(compose(cluster=cluster, algorithm=algorithm)) == []
