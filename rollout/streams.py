"""The driver's side of rollouts: start streams on the workers and gather their tables, whatever dies meanwhile."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError
from ray.experimental import get_local_object_locations

from rollout.actor import StaleWeights
from rollout.config import RolloutConfig, Strategy

HEALTH_TIMEOUT_S = 5.0
RESTART_POLL_S = 0.25
DEATHS_PER_TABLE = 3
T = TypeVar("T")


class RolloutTimeout(TimeoutError):
    """A rollout worker let the driver wait too long."""


class WorkerLost(RuntimeError):
    """A rollout worker died and could not be brought back."""


@dataclass(frozen=True)
class PublishedWeights:
    """The latest exported weights. The driver keeps it, so that a restarted worker can be given them again."""

    version: int
    bucket_refs: list[ray.ObjectRef]
    checksum: int

    def load(self, worker: ActorHandle) -> ray.ObjectRef:
        """Start loading them on one worker."""
        return worker.load_weights.remote(self.version, self.bucket_refs, self.checksum)


@dataclass(eq=False)
class RolloutStream:
    """One worker's share of a rollout, and how far it has come."""

    worker: ActorHandle
    rank: int
    split: str
    example_ids: Sequence[int]
    policy_version: int
    seed: int
    config: RolloutConfig
    group_size: int | None = None
    strategy: Strategy | None = None
    tables: Any = None
    received: int = 0
    waited_s: float = 0.0
    deaths: int = 0
    """Since the last table."""

    def start(self) -> None:
        """Ask for the tables that have not been received yet; at most config.queue_tables of them wait."""
        remaining = list(self.example_ids[self.received * self.config.groups_per_table :])
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": self.config.queue_tables}
        self.tables = self.worker.rollout.options(**options).remote(
            self.split, remaining, self.policy_version, self.seed, self.group_size, self.strategy
        )

    @property
    def num_tables(self) -> int:
        return -(-len(self.example_ids) // self.config.groups_per_table)

    def close(self) -> None:
        """The worker says that it is done. Raises WorkerLost when tables are missing all the same."""
        self.tables = None
        if self.received != self.num_tables:
            raise WorkerLost(f"{self}: the stream ended after {self.received} tables")

    def __str__(self) -> str:
        table = min(self.received + 1, self.num_tables)
        return (
            f"rollout worker {self.rank} (table {table} of {self.num_tables}, {len(self.example_ids)} "
            f"{self.split} groups at policy version {self.policy_version})"
        )


def stream_rollout(
    worker: ActorHandle,
    rank: int,
    split: str,
    example_ids: Sequence[int],
    policy_version: int,
    seed: int,
    config: RolloutConfig,
    group_size: int | None = None,
    strategy: Strategy | None = None,
) -> RolloutStream:
    """Start a rollout on one worker; `collect` hands out its tables.

    The worker pauses while config.queue_tables of its tables wait, and then takes no new weights: collect every stream
    to its end before the next load_weights.
    """
    stream = RolloutStream(
        worker, rank, split, example_ids, policy_version, seed, config, group_size=group_size, strategy=strategy
    )
    stream.start()
    return stream


def collect(
    streams: Sequence[RolloutStream], timeout_s: float, weights: PublishedWeights | None = None
) -> Iterator[tuple[int, ray.ObjectRef]]:
    """Yield (worker rank, reference of a table) as tables finish, every table once, without fetching any.

    A worker that dies and restarts (max_restarts), now or while it was idle, is given `weights` again and repeats
    exactly the tables that were missing. Raises RolloutTimeout when a stream made the driver wait timeout_s for one
    table, WorkerLost when a worker stays dead or keeps dying at one table, and whatever a worker raised.
    """
    live = [stream for stream in streams if len(stream.example_ids)]
    try:
        while live:
            stream = _next_ready(live, timeout_s)
            try:
                ref = next(stream.tables)
                _raise_if_failed(ref, stream)
            except StopIteration:
                live.remove(stream)
                stream.close()
                continue
            except RayActorError as death:
                _revive(stream, weights, timeout_s, death)
                continue
            except StaleWeights as stale:
                if weights is None or stale.held is not None:
                    raise
                _revive(stream, weights, timeout_s, stale)  # it had died before it was asked
                continue
            stream.received += 1
            stream.waited_s, stream.deaths = 0.0, 0
            live.remove(stream)
            live.append(stream)  # the other streams have their turn first
            yield stream.rank, ref
    finally:
        for stream in live:
            stream.tables = None  # a worker whose stream nobody reads would wait for room in its queue


def _next_ready(live: Sequence[RolloutStream], timeout_s: float) -> RolloutStream:
    """The first stream with a table or an end. Time in which the driver does not wait is not held against a stream."""
    patience = timeout_s - max(stream.waited_s for stream in live)
    started = time.monotonic()
    ready = ray.wait([stream.tables for stream in live], timeout=max(0.0, patience), fetch_local=False)[0]
    waited = time.monotonic() - started
    for stream in live:
        stream.waited_s += waited
    if ready:
        return next(stream for stream in live if stream.tables is ready[0])
    slowest = max(live, key=lambda stream: stream.waited_s)
    raise RolloutTimeout(
        f"{slowest}: no table for {slowest.waited_s:.0f} s; {_health(slowest)}. "
        "Raise rollout.timeout_s if it is only slow, lower rollout.groups_per_table for shorter tables"
    )


def _raise_if_failed(ref: ray.ObjectRef, stream: RolloutStream) -> None:
    """Raise the worker's error if `ref` is one. Errors lie in the driver's own memory, so no table is ever fetched."""
    if ref == stream.tables.completed() or not get_local_object_locations([ref])[ref]["node_ids"]:
        ray.get(ref)


def _revive(stream: RolloutStream, weights: PublishedWeights | None, timeout_s: float, death: Exception) -> None:
    """Wait for a dead worker's restart, give it its weights, and start its stream again where it stopped."""
    stream.deaths += 1
    if stream.deaths >= DEATHS_PER_TABLE:
        raise WorkerLost(f"{stream}: died {stream.deaths} times at this table; last: {_first_line(death)}") from death
    try:
        bring_back(stream.worker, weights, timeout_s, str(stream))
    except RayActorError as error:
        raise WorkerLost(f"{stream}: died and was not restarted ({_first_line(error)})") from death
    stream.start()


def bring_back(worker: ActorHandle, weights: PublishedWeights | None, timeout_s: float, name: str) -> None:
    """Wait for a dead worker's restart and give it its weights.

    Raises RolloutTimeout naming it, or RayActorError when it stays dead.
    """
    deadline = time.monotonic() + timeout_s
    _retry_until(deadline, lambda: worker.ready.remote(), f"{name}: restart")
    if weights is not None:
        _retry_until(deadline, lambda: weights.load(worker), f"{name}: reload of version {weights.version}")


def _retry_until(deadline: float, call: Callable[[], ray.ObjectRef], what: str) -> None:
    """Repeat a call to an actor that is being restarted. Raises RayActorError when it is dead for good."""
    while True:
        try:
            ray.get(call(), timeout=max(0.0, deadline - time.monotonic()))
            return
        except ActorUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RESTART_POLL_S)
        except GetTimeoutError as error:
            raise RolloutTimeout(f"{what} is not done in time") from error


def _health(stream: RolloutStream) -> str:
    try:
        health: Any = ray.get(stream.worker.health.remote(), timeout=HEALTH_TIMEOUT_S)
    except GetTimeoutError:
        return f"it does not answer within {HEALTH_TIMEOUT_S:.0f} s either"
    except RayActorError as error:
        return f"it is dead: {_first_line(error)}"
    held = "no loaded version" if health["version"] is None else f"version {health['version']}"
    return f"it holds {held} and has been {health['doing']} for {health['seconds']:.1f} s"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
