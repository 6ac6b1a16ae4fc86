"""What a run that goes on is given, and what it may not be given."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.compose import compose, load, save
from launch.config import ConfigError
from launch.continuation import changes, check_resumable, since_its_checkpoint


@pytest.mark.parametrize(
    "override",
    [
        "train.eval_beams=30",
        "learner.clip_high=0.3",
        "learner.importance_sampling=always",
        "learner.reference_sync_every=5",
        "rewards=[{name: rule}]",
        "rewards=[{name: rule}, {name: ranking}, {name: diversity}]",
        "rewards=[{name: rule}, {name: ranking, args: {formula: paper}}]",
    ],
)
def test_a_run_is_not_resumed_with_another_algorithm_or_evaluation(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        check_resumable(compose(overrides=[override]), compose())


def test_a_run_is_resumed_on_other_machines() -> None:
    rewards = "rewards=[{name: rule, timeout_s: 900, replicas: 2}, {name: ranking, num_cpus: 1}]"
    check_resumable(compose(overrides=[rewards, "data.cache=elsewhere", "learner.ranks=2"]), compose())


def test_what_differs_in_a_continued_run_is_named_key_by_key() -> None:
    old, new = compose(), compose(overrides=["data.generated.users=150", "train.steps=9", "learner.ranks=2"])
    with pytest.raises(ConfigError, match=r"^data\.generated\.users is 150, but the run was started with 1500; "):
        check_resumable(new, old)
    assert changes(old, new) == [
        "data.generated.users: 1500 until now, 150 from now on",
        "learner.ranks: 1 until now, 2 from now on",
        "train.steps: 80 until now, 9 from now on",
    ]


def test_what_may_differ_in_a_continued_run_is_named_too() -> None:
    new = compose(overrides=["data.cache=elsewhere", "rewards=[{name: rule}, {name: ranking, timeout_s: 900}]"])
    check_resumable(new, compose())
    assert changes(compose(), new) == [
        "data.cache: '.cache/catalog' until now, 'elsewhere' from now on",
        "rewards.1.timeout_s: 120.0 until now, 900.0 from now on",
    ]
    assert changes(compose(), compose(overrides=["name=copy", "runs=elsewhere"])) == []


def test_a_run_goes_on_with_what_it_was_started_with(tmp_path: Path) -> None:
    started = tmp_path / "config.yaml"
    first = compose(algorithm="dapo", overrides=["train.steps=7", "learner.optimizer.learning_rate=0.5"])
    save(first, started)
    assert compose(started=started) == first
    longer = compose(overrides=["train.steps=9"], started=started)
    assert changes(first, longer) == ["train.steps: 7 until now, 9 from now on"]


def test_a_run_goes_on_with_what_another_cluster_needs(tmp_path: Path) -> None:
    started = tmp_path / "config.yaml"
    first = compose(cluster="8xA100", algorithm="gspo", overrides=["train.steps=7", "rollout.group_size=8"])
    save(first, started)
    here = compose(cluster="local", started=started)
    check_resumable(here, first)
    assert (here.train.steps, here.rollout.group_size, here.learner.objective) == (7, 8, first.learner.objective)
    assert (here.cluster, here.rollout.workers, here.learner.ranks) == (compose().cluster, 1, 1)


def test_a_run_goes_on_with_its_own_profile_as_it_was(tmp_path: Path) -> None:
    started = tmp_path / "config.yaml"
    own = ["rollout.vllm.max_model_len=4096", "learner.micro_batch_tokens=32768", "rollout.engine=requests"]
    first = compose(cluster="8xA100", model="qwen2.5-7b", overrides=own)
    save(first, started)
    assert compose(cluster="8xA100", started=started) == first


def test_what_a_run_has_beyond_its_old_profile_stays_with_another(tmp_path: Path) -> None:
    started = tmp_path / "config.yaml"
    own = ["rollout.vllm.max_model_len=4096", "rollout.timeout_s=77", "cluster.address=10.0.0.1:6379"]
    first = compose(cluster="8xA100", model="qwen2.5-7b", overrides=own)
    save(first, started)
    here = compose(cluster="1xGPU", started=started)
    assert here.cluster == replace(compose(cluster="1xGPU").cluster, object_store_gib=64)
    assert (here.rollout.vllm, here.rollout.timeout_s) == ({"max_model_len": 4096}, 77)
    assert (here.rollout.kv_cache_gib, here.learner.micro_batch_tokens) == (6, 8192)
    assert (here.train.staleness, here.train.prompts_per_step) == (0, 64)
    assert (here.learner.zero_stage, here.learner.reference_offload) == (3, True)
    on_cpu = compose(cluster="local", started=started)
    assert (on_cpu.learner.dtype, on_cpu.rollout.dtype) == ("bfloat16", "bfloat16")  # of the checkpoints


def test_a_damaged_configuration_is_not_filled_up_with_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save(compose(), path)
    lines = path.read_text().splitlines()
    for kept in (0, 40, len(lines) - 30):
        path.write_text("\n".join(lines[:kept]))
        with pytest.raises(ConfigError, match=r"config\.yaml: .*is missing, so the file is not|must hold a mapping"):
            load(path)
        with pytest.raises(ConfigError, match=r"config\.yaml"):
            compose(cluster="local", started=path)


def test_what_a_checkpoint_was_trained_with_otherwise_is_said(tmp_path: Path) -> None:
    start = tmp_path / "runs" / "base" / "checkpoints" / "sft"
    start.mkdir(parents=True)
    save(compose(), tmp_path / "runs" / "base" / "config.yaml")
    notes = since_its_checkpoint(compose(model=str(start)))
    assert notes == [
        "note: learner.optimizer.learning_rate is 1e-05; it was 0.0002 in run base, from whose "
        "checkpoint this one starts"
    ]
    assert since_its_checkpoint(compose(model=str(start), overrides=["learner.optimizer.learning_rate=2e-4"])) == []
    assert since_its_checkpoint(compose(model=str(tmp_path))) == since_its_checkpoint(compose()) == []
    (tmp_path / "runs" / "base" / "config.yaml").write_text("trainer: another\n")
    assert since_its_checkpoint(compose(model=str(start))) == []
