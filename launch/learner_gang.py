"""All learner ranks of a run, as the loop sees them."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef, ObjectRefGenerator
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError

from catalog.catalog import Catalog
from launch.config import Config
from learner.rank import PEER_LOST, LearnerRank, rank_environment
from rollout.streams import PublishedWeights

BLAME_S = 5.0
"""After one rank failed, how long to wait for the errors of the others before one is blamed."""


class LearnerLost(RuntimeError):
    """A learner rank died or fell silent; the gang has to start again from its last checkpoint."""


class LearnerGang:
    """Data-parallel ranks that make every call together.

    >>> gang = LearnerGang(config, catalog, model_path, rank_options, total_steps)
    >>> for report in gang.sft(folder): ...
    >>> metrics = gang.step(scored_tables)               # references; every rank takes its share
    >>> weights = gang.export(version)                   # references, for RolloutFleet.publish
    >>> gang.save(path, state, keep=2); state = gang.load(path)
    """

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        model_path: Path,
        rank_options: Sequence[dict[str, object]],
        total_steps: int,
    ) -> None:
        self._config, self._catalog, self._model_path = config, catalog, model_path
        self._rank_options, self._total_steps = rank_options, total_steps
        self._ranks: list[ActorHandle] = []
        self.start()

    def start(self) -> None:
        """Create the ranks; does not wait for them."""
        config = self._config
        self._ranks = [
            LearnerRank.options(  # type: ignore[attr-defined]
                runtime_env={"env_vars": rank_environment(on_gpu=bool(options.get("num_gpus")))}, **options
            ).remote(
                rank,
                len(self._rank_options),
                str(self._model_path.resolve()),
                str(self._catalog.path.resolve()),
                config.learner,
                config.rollout.logprob_space,
                self._total_steps,
                config.train.staleness,
            )
            for rank, options in enumerate(self._rank_options)
        ]

    def join(self) -> None:
        """Form the process group and load the model. Raises LearnerLost naming the rank that failed."""
        host, port = self._all("start", [self._ranks[0].address.remote()])[0]
        self._all("join", [rank.join.remote(host, port) for rank in self._ranks])

    def restart(self) -> None:
        """Kill what is left of the gang and start it anew."""
        self.close()
        self.start()
        self.join()

    def sft(self, folder: Path) -> Iterator[dict[str, float]]:
        """Supervised warm-up; yields rank 0's progress reports."""
        streams = self._streams("sft", str(folder.resolve()))
        while reports := [ref for rank, stream in enumerate(streams) if (ref := self._next("SFT", rank, stream))]:
            yield self._all("SFT", reports)[0]

    def step(self, tables: Sequence[ObjectRef]) -> dict[str, float]:
        """One RL step on scored tables; metrics are equal on all ranks."""
        return self._all("step", [rank.step.remote(*tables) for rank in self._ranks])[0]

    def export(self, version: int) -> PublishedWeights:
        """Put the weights into the object store, once, with their checksum."""
        buckets: list[list[ObjectRef]] = []
        for rank, stream in enumerate(self._streams("export_weights")):
            buckets.append([])
            while bucket := self._next("export", rank, stream):
                buckets[rank].append(bucket)
        checksum = self._all("checksum", [rank.weights_checksum.remote() for rank in self._ranks])[0]
        return PublishedWeights(version, buckets[0], checksum)

    def save(self, path: Path, state: dict[str, Any], keep: int | None = None) -> None:
        """Write a checkpoint; the newest `keep` beside it stay."""
        self._all(
            "checkpoint", [rank.save_checkpoint.remote(str(path.resolve()), state, keep) for rank in self._ranks]
        )

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint; returns the state that was saved with it. Raises CheckpointError."""
        return self._all("resume", [rank.load_checkpoint.remote(str(path.resolve())) for rank in self._ranks])[0]

    def save_huggingface(self, path: Path) -> None:
        """Write the weights and the tokenizer as a Hugging Face directory."""
        self._all("save", [rank.save_huggingface.remote(str(path.resolve())) for rank in self._ranks])

    def close(self) -> None:
        """End all ranks."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []

    def _streams(self, method: str, *arguments: Any) -> list[ObjectRefGenerator]:
        return [getattr(rank, method).options(num_returns="streaming").remote(*arguments) for rank in self._ranks]

    def _next(self, what: str, rank: int, stream: ObjectRefGenerator) -> ObjectRef | None:
        """The next result of a rank's stream, None at its end. Raises LearnerLost where none comes in time."""
        limit = self._config.learner.timeout_s
        if not ray.wait([stream], timeout=limit, fetch_local=False)[0]:
            raise LearnerLost(f"learner rank {rank} has not gone on with {what!r} for learner.timeout_s={limit:g} s")
        return next(stream, None)

    def _all(self, what: str, refs: Sequence[ObjectRef]) -> list[Any]:
        """The results of one call on all ranks.

        Raises what a rank raised, or LearnerLost naming the rank that died or does not answer.
        """
        deadline = time.monotonic() + self._config.learner.timeout_s
        waiting: list[ObjectRef] = list(refs)
        failures: dict[int, RayError] = {}
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not done and not failures:
                raise LearnerLost(
                    f"learner ranks {sorted(refs.index(ref) for ref in waiting)} have not finished {what!r} after "
                    f"learner.timeout_s={self._config.learner.timeout_s:g} s"
                )
            if not done:
                break
            try:
                ray.get(done[0])
            except RayError as error:
                failures[refs.index(done[0])] = error
                deadline = min(deadline, time.monotonic() + BLAME_S)  # the others fail too; whose fault is it?
        if failures:
            raise _blame(what, failures)
        return ray.get(list(refs))


def _blame(what: str, failures: dict[int, RayError]) -> Exception:
    """The error of the rank at fault: a dead one, else one with an error of its own, else any that lost its peers."""
    for rank, error in failures.items():
        if isinstance(error, RayActorError):
            return LearnerLost(f"learner rank {rank} died during {what!r}: {str(error).strip().splitlines()[0]}")
    own = [error for error in failures.values() if PEER_LOST not in str(error)]
    return own[0] if own else LearnerLost(str(next(iter(failures.values()))))
