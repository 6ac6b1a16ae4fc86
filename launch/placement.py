"""Which actor takes which devices, and whether the cluster has them."""

import os
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.config import Config, ConfigError


@dataclass(frozen=True)
class Placement:
    """Resources of every actor of a run, in the order rollout workers, learner ranks."""

    device: str
    rollout: list[dict[str, float]]
    learner: list[dict[str, float]]

    @property
    def bundles(self) -> list[dict[str, float]]:
        return [*self.rollout, *self.learner]

    @property
    def gpus(self) -> float:
        return sum(bundle.get("GPU", 0) for bundle in self.bundles)

    def lines(self) -> list[str]:
        """One readable line per kind of actor."""
        return [
            f"{count} x {name:<15} {resources}"
            for name, bundles in (("rollout worker", self.rollout), ("learner rank", self.learner))
            for count, resources in [(len(bundles), _words(bundles[0]))]
        ]


def plan(config: Config) -> Placement:
    """The placement of a configuration. Raises ConfigError when it needs more GPUs than its profile says."""
    if config.cluster.device == "cpu":
        bundle = {"CPU": 0.0}
        return Placement("cpu", [bundle] * config.rollout.workers, [bundle] * config.learner.ranks)
    placement = Placement(
        "gpu",
        [{"CPU": 2.0, "GPU": float(config.rollout.tensor_parallel)}] * config.rollout.workers,
        [{"CPU": 2.0, "GPU": 1.0}] * config.learner.ranks,
    )
    if placement.gpus > config.cluster.gpus:
        raise ConfigError(
            f"rollout.workers={config.rollout.workers} x rollout.tensor_parallel={config.rollout.tensor_parallel} and "
            f"learner.ranks={config.learner.ranks} need {placement.gpus:.0f} GPUs; "
            f"cluster.gpus={config.cluster.gpus} in profile {config.cluster.name}"
        )
    return placement


def check_devices(config: Config, placement: Placement, resources: dict[str, float]) -> None:
    """Raise ConfigError naming what a profile needs and `resources` (as ray.cluster_resources()) lacks."""
    missing = [
        f"{needed:.0f} {kind} (found {resources.get(kind, 0):.0f})"
        for kind in ("GPU", "CPU")
        if (needed := sum(bundle.get(kind, 0) for bundle in placement.bundles)) > resources.get(kind, 0)
    ]
    if missing:
        raise ConfigError(
            f"CLUSTER={config.cluster.name} needs {' and '.join(missing)}; "
            "start it on machines that have them, or take another profile of configs/cluster, such as CLUSTER=local"
        )


def check_this_machine(config: Config, placement: Placement) -> None:
    """check_devices for a profile that starts its own Ray here, without starting it."""
    if config.cluster.address == "local":
        import torch

        found = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
        check_devices(config, placement, found)


def reserve(placement: Placement, timeout_s: float) -> PlacementGroup | None:
    """Reserve all bundles at once, packed on as few nodes as possible; None where nothing needs reserving."""
    if placement.device == "cpu":
        return None
    group = placement_group(placement.bundles, strategy="PACK")
    ready, _ = ray.wait([group.ready()], timeout=timeout_s)
    if not ready:
        raise ConfigError(
            f"the cluster did not free {placement.gpus:.0f} GPUs within cluster.start_timeout_s={timeout_s:.0f} s; "
            f"available now: {_words(ray.available_resources())}"
        )
    return group


def actor_options(placement: Placement, group: PlacementGroup | None, index: int) -> dict[str, object]:
    """Ray options of the actor that takes bundle `index`."""
    bundle = placement.bundles[index]
    options: dict[str, object] = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0)}
    if group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return options


def _words(resources: dict[str, float]) -> str:
    named = {kind: amount for kind, amount in resources.items() if kind in ("CPU", "GPU") and amount}
    return ", ".join(f"{amount:g} {kind}" for kind, amount in named.items()) or "all cores, in turn with the others"
