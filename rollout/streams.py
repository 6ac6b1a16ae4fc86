"""The driver's side of rollouts: start streams on the workers and gather their tables, whatever dies meanwhile."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError
from ray.experimental import get_local_object_locations

from rollout.actor import StaleWeights
from rollout.config import RolloutConfig, Strategy
from rollout.published_weights import PublishedWeights
from rollout.restarts import MAX_DEATHS, START_TIMEOUT_S, RolloutTimeout, WorkerLost, bring_back, first_line

HEALTH_TIMEOUT_S = 5.0
LOCATION_S, LOCATION_POLL_S = 0.1, 0.001
INLINE_BYTES = 100 * 1024
"""What is as small as this comes to the driver with the answer; by Ray's default."""


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
    weights: PublishedWeights | None = None
    """Of its policy version; without them a worker that dies cannot go on."""
    passes: Sequence[int] | None = None
    """Which pass over the data each example is of; None: the first."""
    behind: "RolloutStream | None" = None
    """The next stream that was started on the same worker."""
    reload: ray.ObjectRef | None = None
    """The worker's loading of the weights again, where it has died since they were published."""
    tables: Any = None
    received: int = 0
    waited_s: float = 0.0
    """Since the last table, or the last restart."""
    deaths: int = 0
    """Since the last table."""
    restarts: int = 0
    """Of its worker, that it has waited for."""

    def start(self) -> None:
        """Ask for the tables that have not been received yet; at most config.queue_tables of them wait."""
        missing = slice(self.received * self.config.groups_per_table, None)
        passes = None if self.passes is None else list(self.passes[missing])
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": self.config.queue_tables}
        self.tables = self.worker.rollout.options(**options).remote(
            self.split,
            list(self.example_ids[missing]),
            self.policy_version,
            self.seed,
            self.group_size,
            self.strategy,
            passes,
        )

    @property
    def num_tables(self) -> int:
        return -(-len(self.example_ids) // self.config.groups_per_table)

    def restart(self, timeout_s: float, start_timeout_s: float) -> None:
        """Wait for a dead worker's restart, give it its weights, and start again where the stream stopped.

        What was queued behind is started again, too: the new process may already be at it, and would wait for room in
        a queue that nobody reads before this stream has ended. Limits and errors as `bring_back`.
        """
        behind = list(self._queued_behind())
        for stream in (self, *behind):
            stream.tables = None
        bring_back(self.worker, self.weights, timeout_s, start_timeout_s, str(self))
        self.restarts += 1
        self.start()
        self.waited_s = 0.0
        for stream in behind:
            if stream.weights is not None:
                stream.reload = stream.weights.load(stream.worker)
            stream.start()

    def _queued_behind(self) -> "Iterator[RolloutStream]":
        stream = self.behind
        while stream is not None:
            yield stream
            stream = stream.behind

    def close(self) -> None:
        """The worker says that it is done. Raises WorkerLost when tables are missing all the same."""
        self.tables = self.weights = self.behind = None
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
    weights: PublishedWeights | None = None,
    passes: Sequence[int] | None = None,
    after: RolloutStream | None = None,
) -> RolloutStream:
    """Start a rollout on one worker; `collect` hands out its tables.

    The worker pauses while config.queue_tables of its tables wait, and does nothing else meanwhile: collect streams in
    the order of their start. weights: of policy_version. passes: which pass over the data each example is of, None
    for the first. after: the stream before it on this worker, if any.
    """
    stream = RolloutStream(
        worker, rank, split, example_ids, policy_version, seed, config, group_size, strategy, weights, passes
    )
    if after is not None:
        after.behind = stream
    stream.start()
    return stream


def collect(
    streams: Sequence[RolloutStream], timeout_s: float, start_timeout_s: float = START_TIMEOUT_S
) -> Iterator[tuple[int, ray.ObjectRef]]:
    """Yield (worker rank, reference of a table) as tables finish, every table once, without fetching any.

    A worker that dies and restarts (max_restarts), now or while it was idle, is given its stream's weights again and
    repeats exactly the tables that were missing, those included that went with its node before they were asked for.
    Raises RolloutTimeout when a stream made the driver wait timeout_s for one table, or for start_timeout_s more until
    its worker was back, WorkerLost when a worker stays dead or keeps dying at one table, DataLost when its weights are
    gone, and whatever a worker raised.
    """
    live = [stream for stream in streams if len(stream.example_ids)]
    for stream in streams:
        if stream not in live:
            stream.close()  # so that it holds its weights no longer than the others
    try:
        while live:
            stream = _next_ready(live, timeout_s)
            try:
                ref = next(stream.tables)
                raise_if_failed(ref, stream.tables)
            except StopIteration:
                live.remove(stream)
                stream.close()
                continue
            except (RayActorError, ObjectLostError) as death:
                _revive(stream, timeout_s, start_timeout_s, death)
                continue
            except StaleWeights as stale:
                if stream.weights is None or stale.held is not None:
                    raise
                _revive(stream, timeout_s, start_timeout_s, stale)  # it had died before it was asked
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


def raise_if_failed(ref: ray.ObjectRef, stream: Any) -> None:
    """Raise the error that `ref`, from an ObjectRefGenerator, may stand for.

    Errors lie in the driver's own memory, so that no result is ever fetched.
    """
    if ref == stream.completed() or not _lies_on_a_node(ref):
        ray.get(ref)


def _lies_on_a_node(ref: ray.ObjectRef) -> bool:
    """Whether something is in an object store, and not with the driver or lost.

    Ray may tell where it lies a moment after it tells that it is there, and ray.get would then wait for a second.
    """
    deadline = time.monotonic() + LOCATION_S
    while not (known := get_local_object_locations([ref])[ref])["node_ids"]:
        if (known["object_size"] or 0) <= INLINE_BYTES or time.monotonic() > deadline:
            return False
        time.sleep(LOCATION_POLL_S)
    return True


def _revive(stream: RolloutStream, timeout_s: float, start_timeout_s: float, death: Exception) -> None:
    """Restart a stream whose worker has died; raises WorkerLost where that happens too often, or for good."""
    stream.deaths += 1
    if stream.deaths >= MAX_DEATHS:
        raise WorkerLost(f"{stream}: died {stream.deaths} times at this table; last: {first_line(death)}") from death
    stream.restart(timeout_s, start_timeout_s)


def _health(stream: RolloutStream) -> str:
    try:
        health: Any = ray.get(stream.worker.health.remote(), timeout=HEALTH_TIMEOUT_S)
    except GetTimeoutError:
        return f"it does not answer within {HEALTH_TIMEOUT_S:.0f} s either"
    except RayActorError as error:
        return f"it is dead: {first_line(error)}"
    held = "no loaded version" if health["version"] is None else f"version {health['version']}"
    return f"it holds {held} and has been {health['doing']} for {health['seconds']:.1f} s"
