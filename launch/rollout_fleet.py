"""All rollout workers of a run, as the loop sees them."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError

from catalog.catalog import Catalog
from launch.placement import alive_nodes
from rollout.actor import EngineFactory, RolloutWorker, worker_environment
from rollout.assign import assign
from rollout.config import RolloutConfig, Strategy
from rollout.engines import create_engine
from rollout.published_weights import PublishedWeights
from rollout.restarts import (
    MAX_DEATHS,
    START_TIMEOUT_S,
    Deadline,
    await_restart,
    bring_back,
    keeps_dying,
    lost_data,
    restarts,
)
from rollout.streams import RolloutStream, collect, stream_rollout

logger = logging.getLogger(__name__)

RESTARTS = -1
"""Of a worker over a whole run: without limit, since rollout.restarts gives up on one that dies again and again."""

CLOSE_S = 10.0
"""For engines to end in; an idle one takes 2 s."""


@dataclass
class Flight:
    """Groups on their way: one stream per worker, all of one policy version."""

    streams: list[RolloutStream]
    weights: PublishedWeights


class RolloutFleet:
    """Deals examples to the workers and gathers their tables by reference.

    >>> fleet = RolloutFleet(config, catalog, model_path, worker_options)
    >>> fleet.ready(timeout_s=300)
    >>> fleet.publish(learner.export, version=0)                # and again after every learner step
    >>> flight = fleet.launch("train", example_ids, seed=0)
    >>> for rank, table_ref in fleet.land(flight): ...          # as they finish, each once, whatever dies meanwhile

    Calls on a worker run in the order of their submission, so a rollout launched before `publish` keeps the older
    weights and one launched after it has the newer, without the driver waiting in between.
    """

    def __init__(
        self,
        config: RolloutConfig,
        catalog: Catalog,
        model_path: Path,
        worker_options: Sequence[dict[str, object]],
        engine_factory: EngineFactory = create_engine,
    ) -> None:
        self.config, self.catalog = config, catalog
        nodes = len(alive_nodes())
        self.workers: list[ActorHandle] = [
            RolloutWorker.options(  # type: ignore[attr-defined]
                max_restarts=RESTARTS,
                runtime_env={"env_vars": worker_environment(config, bool(options.get("num_gpus")), nodes)},
                **options,
            ).remote(
                rank, str(model_path.resolve()), str(catalog.path.resolve()), config, engine_factory=engine_factory
            )
            for rank, options in enumerate(worker_options)
        ]
        self._starting: dict[ray.ObjectRef, int] = {
            worker.ready.remote(): rank for rank, worker in enumerate(self.workers)
        }
        self.confirmed_loads = 0
        """Publications that a worker has loaded and answered with the exporter's checksum, each worker's counted.

        Any other answer ends the run with ChecksumMismatch.
        """
        self._weights: PublishedWeights | None = None
        self._loads: dict[tuple[int, int], ray.ObjectRef] = {}
        self._latest: list[RolloutStream | None] = [None] * len(self.workers)
        """Of each worker, the stream that was started last."""
        self._start_timeout_s = START_TIMEOUT_S
        self._restarts: list[int | None] = [0] * len(self.workers)
        """Of each worker, those that the log was told of; None: all that there are when that is looked at next."""

    def ready(self, timeout_s: float) -> None:
        """Wait until every engine is up; a worker that dies meanwhile starts again.

        Raises RolloutTimeout or WorkerLost naming the workers that do not come up, or what an engine raised.
        """
        self._start_timeout_s = timeout_s  # after a death, too
        waiting, deaths = dict(self._starting), Counter[int]()
        deadline = Deadline(timeout_s, "cluster.start_timeout_s")
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=deadline.left_s)
            if not done:
                raise deadline.passed(f"rollout workers {sorted(waiting.values())} not ready")
            rank = waiting.pop(done[0])
            try:
                ray.get(done[0])
            except RayActorError as death:
                deaths[rank] += 1
                if deaths[rank] == MAX_DEATHS:
                    raise keeps_dying(f"rollout worker {rank}", "its engine started", death) from death
                await_restart(self.workers[rank], deadline, f"rollout worker {rank}")
                self._restarts[rank] = None
                waiting[self.workers[rank].ready.remote()] = rank

    @property
    def version(self) -> int | None:
        """Of the weights that were published last, where the workers have them."""
        return None if self._weights is None else self._weights.version

    def publish(self, export: Callable[[int], PublishedWeights], version: int) -> None:
        """Have every worker load what `export(version)` returns, after the rollouts that it was already given.

        Does not wait for the loads. The version before is let go first, so that the object store holds it only as long
        as a flight needs it.
        """
        self._weights = None
        self._weights = weights = export(version)
        self._loads |= {(rank, weights.version): weights.load(worker) for rank, worker in enumerate(self.workers)}

    def loaded(self) -> None:
        """Wait until every worker holds the published weights and has confirmed their checksum."""
        assert self._weights is not None
        for rank, worker in enumerate(self.workers):
            if not self._confirmed(rank, self._weights):
                limits = self.config.timeout_s, self._start_timeout_s
                bring_back(worker, self._weights, *limits, f"rollout worker {rank}")
                self._restarts[rank] = None
                self.confirmed_loads += 1

    def launch(
        self,
        split: str,
        example_ids: np.ndarray,
        seed: int,
        *,
        passes: np.ndarray | None = None,
        group_size: int | None = None,
        strategy: Strategy | None = None,
    ) -> Flight:
        """Start rolling out one group per example with the published weights.

        passes: int [n], over the data, of each example; None: all of the first. Samples of an example differ by pass.
        """
        assert self._weights is not None
        lengths = self.catalog.examples(split).prompt_lengths[example_ids]
        shares = assign(lengths, len(self.workers), self.config.groups_per_table)
        streams = [
            stream_rollout(
                worker,
                rank,
                split,
                [int(example_ids[i]) for i in share],
                self._weights.version,
                seed,
                self.config,
                group_size=group_size,
                strategy=strategy,
                weights=self._weights,
                passes=None if passes is None else [int(passes[i]) for i in share],
                after=self._latest[rank],
            )
            for rank, (worker, share) in enumerate(zip(self.workers, shares, strict=True))
        ]
        self._latest = list(streams)
        return Flight(streams, self._weights)

    def land(self, flight: Flight) -> Iterator[tuple[int, ray.ObjectRef]]:
        """(worker rank, reference of a table) of a flight as they finish, those of one worker in their order."""
        for stream in flight.streams:
            if not self._confirmed(stream.rank, flight.weights, stream.reload):
                stream.restart(self.config.timeout_s, self._start_timeout_s)
                self.confirmed_loads += 1
        yield from collect(flight.streams, self.config.timeout_s, self._start_timeout_s)
        for stream in flight.streams:
            if stream.restarts:
                self._restarts[stream.rank] = None

    def sleep(self) -> None:
        """Have the workers let go of weights and KV cache until the next `publish`, where rollout.sleep asks for it.

        A worker that has died meanwhile is found by that `publish`.
        """
        if not self.config.sleep:
            return
        resting: list[ray.ObjectRef] = [worker.sleep.remote() for worker in self.workers]
        for rank, ref in enumerate(resting):
            deadline = Deadline(self.config.timeout_s, "rollout.timeout_s")
            try:
                with suppress(RayActorError):
                    ray.get(ref, timeout=deadline.left_s)
            except GetTimeoutError as error:
                raise deadline.passed(f"rollout worker {rank} has not let go of its memory") from error

    def close(self) -> None:
        """Have engines end that are several processes each: killed with their actors, they leave shared memory behind.

        A worker that is not done in CLOSE_S, in the middle of a rollout say, is killed all the same; so are all where
        Ray is broken, whose error is not this one's to tell.
        """
        if self.config.tensor_parallel > 1:
            with suppress(RayError):
                closing: list[ray.ObjectRef] = [worker.close.remote() for worker in self.workers]
                ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)

    def abandon(self) -> None:
        """Forget flights that nobody will land: their workers start anew, which also empties their queues."""
        for worker in self.workers:
            ray.kill(worker, no_restart=False)
        self._weights, self._loads = None, {}
        self._latest, self._restarts = [None] * len(self.workers), [None] * len(self.workers)

    def _confirmed(self, rank: int, weights: PublishedWeights, reload: ray.ObjectRef | None = None) -> bool:
        """Wait for a load, or for the one that took its place; False where the worker has died before or in it.

        Raises ChecksumMismatch, or DataLost where the weights are gone.
        """
        for older in sorted(key for key in self._loads if key[0] == rank and key[1] < weights.version):
            self._is_done(self._loads.pop(older), *older)  # which no rollout has needed
        load = self._loads.pop((rank, weights.version), None)
        load = load if reload is None else reload
        return load is None or self._is_done(load, rank, weights.version)

    def _is_done(self, load: ray.ObjectRef, rank: int, version: int) -> bool:
        """Wait for one load; False where the worker has died. Raises as `_confirmed`.

        The new process of one that died before it was asked to load has to start its engine first.
        """
        deadline = Deadline(self.config.timeout_s, "rollout.timeout_s")
        while not ray.wait([load], timeout=deadline.left_s, fetch_local=False)[0]:
            if not self._restarted(rank):
                raise deadline.passed(f"rollout worker {rank} has not loaded version {version}")
            deadline = Deadline.of_restart(self.config.timeout_s, self._start_timeout_s)
        try:
            ray.get(load)
        except (ObjectLostError, RayActorError) as error:
            if (lost := lost_data(error)) is not None:
                raise lost from error
            return False
        self._restarted(rank)
        self.confirmed_loads += 1
        return True

    def _restarted(self, rank: int) -> bool:
        """Whether Ray has put a new process in the place of one that ended; the log is told of what it was not yet."""
        before, known = self._restarts[rank], restarts(self.workers[rank])
        self._restarts[rank] = known
        if before is not None and before != known:
            logger.warning("rollout worker %d: its process has ended; a new one is in its place", rank)
        return before != known
