"""Rollout workers with a fake engine, and what tests of them share."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import ray
import rollout_fakes
import torch
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from catalog.catalog import Catalog
from rollout.actor import RolloutWorker
from rollout.config import RolloutConfig
from rollout.published_weights import PublishedWeights
from rollout.streams import collect
from rollout.weights import WeightBucket, checksum

CONFIG = RolloutConfig(group_size=4, groups_per_table=2, queue_tables=2)
IDS = [5, 0, 3, 9, 1, 7, 2]
TIMEOUT_S = 60.0

cloudpickle.register_pickle_by_value(rollout_fakes)  # Ray's workers do not have the tests on their path


def started_worker(
    catalog: Catalog, folder: Path, rank: int, version: int | None, restarts: int = 0
) -> Iterator[ActorHandle]:
    """version: of the weights that it is given; None: it has none."""
    options = RolloutWorker.options(num_cpus=0, max_restarts=restarts)
    handle = options.remote(rank, str(folder), str(catalog.path), CONFIG, rollout_fakes.FakeEngine)
    ray.get(handle.ready.remote(), timeout=TIMEOUT_S)
    if version is not None:
        give(handle, published(version))
    yield handle
    ray.kill(handle)


def give(worker: ActorHandle, weights: PublishedWeights) -> None:
    ray.get(weights.load(worker), timeout=TIMEOUT_S)


def tables_of(streams: list, timeout_s: float = TIMEOUT_S) -> list[pa.Table]:
    return [ray.get(ref) for _, ref in collect(streams, timeout_s)]


def published(version: int, value: float = 1.0) -> PublishedWeights:
    tensors = [("a", torch.full((3, 2), value)), ("b", torch.arange(4.0))]
    refs = [ray.put(WeightBucket.pack([tensor])) for tensor in tensors]
    return PublishedWeights(version, refs, checksum(tensors))


def kill_process(worker: ActorHandle) -> None:
    os.kill(ray.get(worker.health.remote())["process"], signal.SIGKILL)


def wait_for_restart(worker: ActorHandle, process: int) -> None:
    """Until another process answers for the worker."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(RayActorError):
            if ray.get(worker.health.remote(), timeout=TIMEOUT_S)["process"] != process:
                return
        time.sleep(0.1)
    raise TimeoutError("the worker was not restarted")
