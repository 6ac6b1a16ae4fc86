"""Which actor takes which devices, and whether the cluster has them."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from launch.config import Config, ConfigError
from rewards.terms import actor_resources


@dataclass(frozen=True)
class Placement:
    """Resources of every actor of a run."""

    device: str
    rollout: list[dict[str, float]]
    learner: list[dict[str, float]]
    rewards: list[dict[str, float]]
    """Of reward actors; Ray puts them where there is room."""
    colocated: bool = False
    """Whether worker i and rank i share a device."""

    @property
    def actors(self) -> list[dict[str, float]]:
        """Rollout workers, then learner ranks."""
        return [*self.rollout, *self.learner]

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What is reserved together; actor i takes bundle i modulo their number."""
        if not self.colocated:
            return self.actors
        pairs = zip(self.rollout, self.learner, strict=True)
        return [{kind: worker[kind] + rank[kind] for kind in worker} for worker, rank in pairs]

    def total(self, kind: str) -> float:
        """CPUs ("CPU") or GPUs ("GPU") of all actors."""
        return sum(actor.get(kind, 0) for actor in (*self.actors, *self.rewards))

    def lines(self) -> list[str]:
        """One readable line per kind of actor and its resources."""
        kinds = (("rollout worker", self.rollout), ("learner rank", self.learner), ("reward actor", self.rewards))
        return [
            f"{count} x {name:<15} {resources}"
            for name, actors in kinds
            for resources, count in Counter(map(_words, actors)).items()
        ]


def plan(config: Config) -> Placement:
    """The placement of a configuration.

    Raises ConfigError when it needs more GPUs than its profile says, RewardError for a reward that cannot be found.
    """
    rewards = actor_resources(config.rewards)
    if config.cluster.device == "cpu":
        bundle = {"CPU": 0.0}
        return Placement("cpu", [bundle] * config.rollout.workers, [bundle] * config.learner.ranks, rewards)
    share = 0.5 if config.cluster.colocate else 1.0
    placement = Placement(
        "gpu",
        [{"CPU": 2.0, "GPU": share * config.rollout.tensor_parallel}] * config.rollout.workers,
        [{"CPU": 2.0, "GPU": share}] * config.learner.ranks,
        rewards,
        config.cluster.colocate,
    )
    if placement.total("GPU") > config.cluster.gpus:
        of_rewards = sum(actor["GPU"] for actor in rewards)
        raise ConfigError(
            ("colocated " if config.cluster.colocate else "")
            + f"rollout.workers={config.rollout.workers} x rollout.tensor_parallel={config.rollout.tensor_parallel}"
            + (f", rewards (num_gpus, {of_rewards:g} in all)" if of_rewards else "")
            + f" and learner.ranks={config.learner.ranks} need {placement.total('GPU'):g} GPUs; "
            f"cluster.gpus={config.cluster.gpus} in profile {config.cluster.name}"
        )
    return placement


def check_devices(config: Config, placement: Placement, resources: dict[str, float]) -> None:
    """Raise ConfigError naming what a profile needs and `resources` (as ray.cluster_resources()) lacks."""
    missing = [
        f"{needed:g} {kind} (found {resources.get(kind, 0):g})"
        for kind in ("GPU", "CPU")
        if (needed := placement.total(kind)) > resources.get(kind, 0)
    ]
    if missing:
        raise ConfigError(
            f"CLUSTER={config.cluster.name} needs {' and '.join(missing)}; "
            "start it on machines that have them, or take another profile of configs/cluster, such as CLUSTER=local"
        )


def check_this_machine(config: Config, placement: Placement) -> None:
    """check_devices for a profile that starts its own Ray here, without starting it."""
    if config.cluster.address == "local":
        gpus = _usable_gpus(config) if placement.total("GPU") else 0
        check_devices(config, placement, {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus)})


def _usable_gpus(config: Config) -> int:
    """How many this machine has. Raises ConfigError where CUDA cannot use them."""
    import torch  # takes seconds

    gpus = torch.cuda.device_count()  # also counts those that an old driver keeps from CUDA
    if gpus and not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except RuntimeError as error:
            raise ConfigError(
                f"CLUSTER={config.cluster.name}: torch cannot use the GPUs of this machine (CUDA "
                f"{torch.version.cuda}): {error}"
            ) from error
    return gpus


def reserve(placement: Placement, timeout_s: float) -> PlacementGroup | None:
    """Reserve all bundles at once, packed on as few nodes as possible; None where nothing needs reserving."""
    if placement.device == "cpu":
        return None
    group = placement_group(placement.bundles, strategy="PACK")
    ready, _ = ray.wait([group.ready()], timeout=timeout_s)
    if not ready:
        raise ConfigError(
            f"the cluster did not free {placement.total('GPU'):g} GPUs within "
            f"cluster.start_timeout_s={timeout_s:.0f} s; available now: {_words(ray.available_resources())}"
        )
    return group


def alive_nodes() -> list[str]:
    """Ray's ids of the nodes of the cluster."""
    return sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])


def actor_options(
    placement: Placement, group: PlacementGroup | None, index: int, nodes: Sequence[str] = ()
) -> dict[str, object]:
    """Ray options of actor `index`. nodes: dealt in turn to actors that reserve nothing, while they are alive."""
    actor = placement.actors[index]
    options: dict[str, object] = {"num_cpus": actor["CPU"], "num_gpus": actor.get("GPU", 0)}
    if group is None and nodes:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(nodes[index % len(nodes)], soft=True)
        options["memory"] = 1  # byte: Ray puts an actor that reserves nothing at all on any node
    elif group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=index % len(placement.bundles)
        )
    return options


def _words(resources: dict[str, float]) -> str:
    named = {kind: amount for kind, amount in resources.items() if kind in ("CPU", "GPU") and amount}
    return ", ".join(f"{amount:g} {kind}" for kind, amount in named.items()) or "all cores, in turn with the others"
