"""What every node of a joined cluster must have: the run's files under the same paths, and the same environment."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launch.config import ConfigError

INHERITED = (
    "DS_ACCELERATOR",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_HUB_OFFLINE",
    "PYTHONWARNINGS",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_VERBOSITY",
    "VLLM_LOGGING_LEVEL",
)
"""Variables that a process on another node takes over from the driver; one of a local Ray has them anyway."""
NEEDED_MODULES = ("torch", "vllm", "deepspeed", "transformers", "pyarrow")


def inherited_environment() -> dict[str, str]:
    """Those of INHERITED that the driver has."""
    return {name: os.environ[name] for name in INHERITED if name in os.environ}


def check_nodes(paths: Sequence[Path], timeout_s: float) -> None:
    """Raise ConfigError naming a node of the cluster that lacks one of `paths`, this project or what it needs.

    Actors and tasks may run on any node, and would write checkpoints and samples to a disk that nobody else sees.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    wanted = [str(path.resolve()) for path in paths]
    asked = {
        _missing.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(wanted): address
        for node, address in nodes.items()
    }
    for ref, address in asked.items():
        try:
            files, modules = ray.get(ref, timeout=timeout_s)
        except GetTimeoutError as error:
            raise ConfigError(
                f"node {address} did not start a process within cluster.start_timeout_s={timeout_s:g} s; remove it "
                "from the cluster, or raise the limit"
            ) from error
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(
                f"node {address} cannot run this project ({reason}); start Ray there from the same environment, with "
                "the project under the same path"
            ) from error
        if modules:
            raise ConfigError(
                f"node {address} lacks the Python packages {', '.join(modules)}; start Ray there from the same "
                "environment as here"
            )
        if files:
            raise ConfigError(
                f"node {address} has no {files[0]}; all nodes of a cluster need the run's files under the same path, "
                "on a file system that they share"
            )


@ray.remote(num_cpus=0, max_retries=0)
def _missing(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """(paths that are not on this node, packages that are not)"""
    return [path for path in paths if not os.path.exists(path)], [
        name for name in NEEDED_MODULES if not find_spec(name)
    ]
