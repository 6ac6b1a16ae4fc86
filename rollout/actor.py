"""The rollout worker: a Ray actor that owns one engine and streams group tables."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from catalog.catalog import Catalog
from rollout.config import RolloutConfig, Strategy
from rollout.engine import EngineDied, RolloutEngine
from rollout.engines import create_engine
from rollout.groups import group_table, validate_groups
from rollout.host_memory import host_environment
from rollout.metrics import with_seconds

EngineFactory = Callable[[str, Path, RolloutConfig], RolloutEngine]


class StaleWeights(RuntimeError):
    """A rollout was asked of a policy version that the worker does not hold."""

    def __init__(self, rank: int, held: int | None, asked: int) -> None:
        super().__init__(rank, held, asked)
        self.rank, self.held, self.asked = rank, held, asked

    def __str__(self) -> str:
        held = "no version" if self.held is None else f"version {self.held}"
        return (
            f"rollout worker {self.rank} holds {held}, the rollout asks for version {self.asked}; "
            "call load_weights with that version first (a worker that was restarted or sleeps has no weights)"
        )


class ChecksumMismatch(RuntimeError):
    """A worker's weights after loading are not the ones that were exported."""

    def __init__(self, rank: int, version: int, exported: int, loaded: int) -> None:
        super().__init__(rank, version, exported, loaded)
        self.rank, self.version, self.exported, self.loaded = rank, version, exported, loaded

    def __str__(self) -> str:
        return (
            f"rollout worker {self.rank}, version {self.version}: the exporter's checksum is {self.exported:#018x}, "
            f"the loaded weights have {self.loaded:#018x}; its rollouts would come from another policy"
        )


def worker_environment(config: RolloutConfig, on_gpu: bool, nodes: int = 1) -> dict[str, str]:
    """What a worker's process must start with: Ray would give an actor that reserves no cores a single thread.

    nodes: over which workers without GPUs are spread; each is taken to have as many cores as this one.
    """
    cores = len(os.sched_getaffinity(0))
    on_a_node = config.workers if on_gpu else -(-config.workers // nodes)
    threads = {"OMP_NUM_THREADS": str(config.threads or max(1, cores // on_a_node))}
    return threads if on_gpu else threads | host_environment()


@ray.remote(concurrency_groups={"health": 1})  # type: ignore[call-overload]
class RolloutWorker:
    """Holds one engine; every table it streams is a pure function of (policy version, example ids, passes, seed).

    But for the seconds that it took, which a table carries for `rollout_metrics`.

    >>> worker = RolloutWorker.options(num_gpus=1, max_restarts=3).remote(0, model_path, catalog_path, config)
    >>> ray.get(worker.ready.remote())
    >>> ray.get(worker.load_weights.remote(version, bucket_refs, checksum))
    >>> stream = stream_rollout(worker, 0, "train", example_ids, version, seed, config)   # rollout.streams
    >>> for rank, table_ref in collect([stream], timeout_s): ...

    One call runs at a time, so weights never change under a rollout; `health` answers at any time.
    """

    def __init__(
        self,
        rank: int,
        model_path: str,
        catalog_path: str,
        config: RolloutConfig,
        engine_factory: EngineFactory = create_engine,
    ) -> None:
        """load_weights comes before any rollout."""
        self._rank = rank
        self._config = config
        self._version: int | None = None
        self._catalog = Catalog.load(catalog_path)
        self._now("idle")
        self._create_engine = partial(engine_factory, model_path, self._catalog.path / "trie.arrow", config)
        self._created: RolloutEngine | None = None

    @property
    def _engine(self) -> RolloutEngine:
        """Not made with the actor: what an engine refuses must come out as its own error, not as a dead actor."""
        if self._created is None:
            self._now("starting the engine")
            try:
                self._created = self._create_engine()
            finally:
                self._now("idle")
        return self._created

    def ready(self) -> int:
        """The worker's rank, once the engine is up. Raises what the engine refuses."""
        _ = self._engine
        return self._rank

    def rollout(
        self,
        split: str,
        example_ids: Sequence[int],
        policy_version: int,
        seed: int,
        group_size: int | None = None,
        strategy: Strategy | None = None,
        passes: Sequence[int] | None = None,
    ) -> Iterator[pa.Table]:
        """Stream tables of config.groups_per_table rows (the last may be shorter), in the order of example_ids.

        split: "train", "valid" or "test". group_size, strategy: replace the configured ones, for evaluation. passes:
        which pass over the data each example is of, None where all are of the first; see group_seed.
        Raises StaleWeights when the worker holds another policy version.
        """
        if policy_version != self._version:
            raise StaleWeights(self._rank, self._version, policy_version)
        try:
            passes = [0] * len(example_ids) if passes is None else passes
            yield from self._tables(split, example_ids, passes, policy_version, seed, group_size, strategy)
        finally:
            self._now("idle")

    def _tables(
        self,
        split: str,
        example_ids: Sequence[int],
        passes: Sequence[int],
        policy_version: int,
        seed: int,
        group_size: int | None,
        strategy: Strategy | None,
    ) -> Iterator[pa.Table]:
        examples = self._catalog.examples(split)
        for first in range(0, len(example_ids), self._config.groups_per_table):
            ids = [int(i) for i in example_ids[first : first + self._config.groups_per_table]]
            self._now(f"generating groups {first} to {first + len(ids) - 1} of {len(example_ids)} ({split})")
            prompts: list[Any] = [examples.prompt_tokens(i) for i in ids]
            targets = [int(examples.target_class[i]) for i in ids]
            of_pass = passes[first : first + len(ids)]
            seeds = [group_seed(seed, policy_version, *place) for place in zip(ids, of_pass, strict=True)]
            started = time.perf_counter()
            with self._that_ends_with_its_engine():
                groups = self._engine.generate(prompts, seeds, targets, group_size=group_size, strategy=strategy)
            seconds = time.perf_counter() - started
            self._now(f"waiting for room in the queue ({split}, {first + len(ids)} of {len(example_ids)} groups done)")
            table = group_table(ids, policy_version, prompts, targets, groups)
            validate_groups(table)
            yield with_seconds(table, seconds)

    def load_weights(self, version: int, bucket_refs: list[ray.ObjectRef], checksum: int) -> int:
        """Replace the weights by those of `version`; the checksum of what the engine then holds.

        bucket_refs: references to rollout.weights.WeightBucket. checksum: the exporter's. Raises ChecksumMismatch with
        both values, after which the worker refuses rollouts until a load succeeds.
        """
        engine = self._engine
        self._now(f"loading the weights of version {version}")
        self._version = None
        try:
            buckets = ray.get(list(bucket_refs), timeout=self._config.timeout_s)
            with self._that_ends_with_its_engine():
                loaded = engine.load_weights(buckets)
        finally:
            self._now("idle")
        if loaded != checksum:
            raise ChecksumMismatch(self._rank, version, checksum, loaded)
        self._version = version
        return loaded

    def sleep(self) -> None:
        """Let go of weights and KV cache. Rollouts are refused until load_weights, which wakes the worker."""
        self._version = None
        if self._created is not None:  # else it has just been restarted
            with self._that_ends_with_its_engine():
                self._created.sleep()

    def close(self) -> None:
        """End the engine and its processes."""
        if self._created is not None:
            self._created.shutdown()
            self._created = None

    @ray.method(concurrency_group="health")
    def health(self) -> dict[str, Any]:
        """What the worker is doing and for how long: {"rank", "process", "version", "doing", "seconds"}."""
        doing, since = self._doing
        return {
            "rank": self._rank,
            "process": os.getpid(),
            "version": self._version,
            "doing": doing,
            "seconds": time.monotonic() - since,
        }

    @contextmanager
    def _that_ends_with_its_engine(self) -> Iterator[None]:
        """A worker whose engine has died ends, too: Ray restarts it, and streams take it up where it was."""
        try:
            yield
        except EngineDied as death:
            print(f"rollout worker {self._rank}: {death}; it starts anew", file=sys.stderr, flush=True)
            os._exit(1)

    def _now(self, doing: str) -> None:
        self._doing = (doing, time.monotonic())


def group_seed(seed: int, policy_version: int, example_id: int, data_pass: int = 0) -> int:
    """The seed of one group, in [0, 2^63): it depends on neither the batch nor the worker.

    policy_version: -1 in the trial before training. data_pass: over the training data, since one policy may meet an
    example twice, at the end of a pass and at the beginning of the next.
    """
    entropy = [seed, policy_version % 2**32, example_id, data_pass]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
