"""Placement arithmetic, and refusal where devices are missing."""

from types import SimpleNamespace

import pytest

from launch.compose import compose
from launch.config import ConfigError
from launch.placement import actor_options, check_devices, check_this_machine, plan, reserve


def test_eight_gpus_are_split_between_rollouts_and_learner() -> None:
    placement = plan(compose(cluster="8xA100"))
    assert placement.total("GPU") == 8
    assert len(placement.rollout) == len(placement.learner) == 4


def test_more_actors_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.workers=5 .* need 9 GPUs; cluster\.gpus=8"):
        plan(compose(cluster="8xA100", overrides=["rollout.workers=5"]))


def test_gpus_of_rewards_count() -> None:
    reward = "rewards=[{name: rule},{name: semantic,num_gpus: 0.5,replicas: 2}]"
    with pytest.raises(ConfigError, match=r"rewards \(num_gpus, 1 in all\) .* need 9 GPUs; cluster\.gpus=8"):
        plan(compose(cluster="8xA100", overrides=[reward]))
    config = compose(overrides=[reward])
    with pytest.raises(ConfigError, match=r"CLUSTER=local needs 1 GPU \(found 0\)"):
        check_devices(config, plan(config), {"CPU": 2.0})


def test_worker_and_rank_share_a_gpu_where_they_are_colocated() -> None:
    overrides = ["cluster.gpus=2", "rollout.workers=2", "learner.ranks=2"]
    placement = plan(compose(cluster="1xGPU", overrides=overrides))
    assert placement.total("GPU") == 2
    assert placement.bundles == [{"CPU": 4.0, "GPU": 1.0}] * 2
    assert [actor_options(placement, None, index)["num_gpus"] for index in range(4)] == [0.5] * 4
    with pytest.raises(ConfigError, match=r"cluster\.colocate=True: .*train\.staleness=0"):
        compose(cluster="1xGPU", overrides=["train.staleness=1"])
    with pytest.raises(ConfigError, match=r"colocated rollout\.workers=2 .* need 2 GPUs; cluster\.gpus=1"):
        plan(compose(cluster="1xGPU", overrides=overrides[1:]))


def test_missing_gpus_are_named() -> None:
    config = compose(cluster="8xA100")
    with pytest.raises(ConfigError, match=r"CLUSTER=8xA100 needs 8 GPU \(found 0\)"):
        check_devices(config, plan(config), {"CPU": 64.0})


def test_gpus_that_cuda_cannot_use_are_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.init", too_old)
    config = compose(cluster="8xA100")
    with pytest.raises(ConfigError, match=r"CLUSTER=8xA100: torch cannot use .* driver on your system is too old"):
        check_this_machine(config, plan(config))


def test_a_cpu_profile_needs_no_devices() -> None:
    config = compose()
    check_devices(config, plan(config), {"CPU": 2.0})
    assert reserve(plan(config), 1.0) is None


def test_a_worker_of_several_ranks_takes_a_gpu_for_each() -> None:
    placement = plan(compose(cluster="8xA100", overrides=["rollout.workers=2", "rollout.tensor_parallel=2"]))
    assert placement.rollout == [{"CPU": 2.0, "GPU": 2.0}] * 2
    assert placement.total("GPU") == 8


def test_missing_cpus_are_named() -> None:
    config = compose(cluster="8xA100")
    with pytest.raises(ConfigError, match=r"CLUSTER=8xA100 needs 16 CPU \(found 3\);"):
        check_devices(config, plan(config), {"GPU": 8.0, "CPU": 3.0})


def test_devices_of_another_cluster_are_not_looked_for_here() -> None:
    config = compose(cluster="8xA100", overrides=["cluster.address=auto"])
    check_this_machine(config, plan(config))


def test_bundles_are_reserved_together_and_shared_where_actors_are_colocated(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[tuple[list, str]] = []

    def reserving(bundles: list, strategy: str) -> SimpleNamespace:
        reserved.append((bundles, strategy))
        return SimpleNamespace(ready=lambda: None)

    monkeypatch.setattr("launch.placement.placement_group", reserving)
    monkeypatch.setattr("ray.wait", lambda refs, timeout: (refs, []))
    overrides = ["cluster.gpus=2", "rollout.workers=2", "learner.ranks=2"]
    placement = plan(compose(cluster="1xGPU", overrides=overrides))
    group = reserve(placement, 5.0)
    assert reserved == [(placement.bundles, "PACK")]
    strategies = [actor_options(placement, group, index)["scheduling_strategy"] for index in range(4)]
    assert [strategy.placement_group_bundle_index for strategy in strategies] == [0, 1, 0, 1]
    monkeypatch.setattr("ray.wait", lambda refs, timeout: ([], refs))
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 3.0, "memory": 1.0})
    with pytest.raises(ConfigError, match=r"did not free 2 GPUs within .*=5 s; available now: 3 CPU$"):
        reserve(placement, 5.0)
