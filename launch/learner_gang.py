"""All learner ranks of a run, as the loop sees them."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef, ObjectRefGenerator
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from catalog.catalog import Catalog
from launch.config import Config
from learner import checkpoint
from learner.mismatch import check_mismatch
from learner.rank import PEER_LOST, LearnerRank, rank_environment
from rollout.published_weights import PublishedWeights
from rollout.restarts import lost_data
from rollout.streams import raise_if_failed

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
        rank_class: Any = LearnerRank,
    ) -> None:
        """rank_options: how Ray is to start each rank. rank_class: what is started."""
        self._config, self._catalog, self._model_path = config, catalog, model_path
        self._rank_options, self._total_steps, self._rank_class = rank_options, total_steps, rank_class
        self._ranks: list[ActorHandle] = []
        self.start()

    def start(self) -> None:
        """Create the ranks; does not wait for them."""
        config = self._config
        self._joined = False
        self._hosts = ["a node"] * len(self._rank_options)
        # Of each rank; the addresses are known once the ranks have started.
        self._saved: tuple[Path, dict[str, Any]] | None = None
        # The checkpoint that holds what the ranks hold now, and the state that was saved with it.
        self._ranks = [
            self._rank_class.options(
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
                config.train.seed,
            )
            for rank, options in enumerate(self._rank_options)
        ]

    def join(self) -> None:
        """Form the process group and load the model, where that has not been done.

        Raises LearnerLost naming the rank that failed.
        """
        if self._joined:
            return
        addresses = self._addresses()
        self._hosts = [host for host, _ in addresses]
        self._all(
            "join",
            [
                rank.join.remote(*addresses[0], self._hosts.count(host))
                for rank, host in zip(self._ranks, self._hosts, strict=True)
            ],
        )
        self._joined = True

    def restart(self) -> None:
        """Kill what is left of the gang and start it anew; then it has to join."""
        self.close()
        self.start()

    def sft(self, folder: Path) -> Iterator[dict[str, float]]:
        """Supervised fine-tuning; yields rank 0's progress reports."""
        self._saved = None
        for rank, report in self._stream("sft", str(folder.resolve())):
            if rank == 0:
                yield ray.get(report)

    def step(self, tables: Sequence[ObjectRef]) -> dict[str, float]:
        """One RL step on scored tables; metrics are equal on all ranks.

        Raises MismatchError where rollout and learner should have had the same policy.
        """
        self._saved = None
        metrics = self._all("step", [rank.step.remote(*tables) for rank in self._ranks])[0]
        if not self._config.train.staleness and not self._config.learner.lora.dropout:
            check_mismatch(metrics["mismatch"], self._config.learner)
        return metrics

    def check_rollouts(self, tables: Sequence[ObjectRef]) -> None:
        """Raise where scored tables do not come from the present weights."""
        self._all("check_rollouts", [rank.check_rollouts.remote(*tables) for rank in self._ranks])

    def export(self, version: int) -> PublishedWeights:
        """Put the weights into the object store, once, with their checksum."""
        buckets = [bucket for _, bucket in self._stream("export_weights")]  # all of rank 0
        checksum = self._all("checksum", [rank.weights_checksum.remote() for rank in self._ranks])[0]
        return PublishedWeights(version, buckets, checksum)

    def save(self, path: Path, state: dict[str, Any], keep: int | None = None) -> None:
        """Write a checkpoint; the newest `keep` beside it stay."""
        saving = [rank.save_checkpoint.remote(str(path.resolve()), state, keep) for rank in self._ranks]
        try:
            self._all("checkpoint", saving)
        except RayTaskError:  # a rank that is lost is started again, and drops it then
            checkpoint.discard(path)
            raise
        self._saved = path, state

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint; returns the state that was saved with it. Raises CheckpointError.

        Nothing is read where the ranks have written it and done nothing since.
        """
        if self._saved is None or self._saved[0] != path:
            loading = [rank.load_checkpoint.remote(str(path.resolve())) for rank in self._ranks]
            self._saved = path, self._all("resume", loading)[0]
        return self._saved[1]

    def save_huggingface(self, path: Path) -> None:
        """Write the weights and the tokenizer as a Hugging Face directory."""
        self._all("save", [rank.save_huggingface.remote(str(path.resolve())) for rank in self._ranks])

    def close(self) -> None:
        """End all ranks."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []

    def _stream(self, method: str, *arguments: Any) -> Iterator[tuple[int, ObjectRef]]:
        """(rank, reference) of everything that a method yields on all ranks, as it comes; errors as `_all`."""
        running: dict[int, ObjectRefGenerator] = {
            rank: getattr(actor, method).options(num_returns="streaming").remote(*arguments)
            for rank, actor in enumerate(self._ranks)
        }
        failures: dict[int, RayError] = {}
        while running:
            limit = BLAME_S if failures else self._config.learner.timeout_s
            ready = ray.wait(list(running.values()), timeout=limit, fetch_local=False)[0]
            if not ready and failures:
                break
            if not ready:
                raise self._late(method, sorted(running))
            rank = next(rank for rank, stream in running.items() if stream is ready[0])
            try:
                result = next(running[rank])
                raise_if_failed(result, running[rank])
            except StopIteration:
                del running[rank]
            except RayError as error:
                failures[rank] = error
                del running[rank]
            else:
                if not failures:
                    yield rank, result
        if failures:
            raise _blame(method, failures, self._hosts)

    def _addresses(self) -> list[tuple[str, int]]:
        """Of all ranks, once Ray has found a place for each; raises LearnerLost where a dead node has left too few."""
        asked: list[Any] = [rank.address.remote() for rank in self._ranks]
        limit = self._config.cluster.start_timeout_s
        missing = ray.wait(asked, num_returns=len(asked), timeout=limit)[1]
        if missing:
            free = ray.available_resources()
            raise LearnerLost(
                f"learner ranks {[asked.index(ref) for ref in missing]} have not started within "
                f"cluster.start_timeout_s={limit:g} s; is there a node with room for them? free now: "
                f"{free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU"
            )
        return self._all("start", asked)

    def _late(self, what: str, ranks: Sequence[int]) -> LearnerLost:
        limit = self._config.learner.timeout_s
        return LearnerLost(f"learner ranks {ranks} have not gone on with {what!r} for learner.timeout_s={limit:g} s")

    def _all(self, what: str, refs: Sequence[ObjectRef]) -> list[Any]:
        """The results of one call on all ranks.

        Raises what a rank raised, LearnerLost naming the rank that died or does not answer, or DataLost.
        """
        deadline = time.monotonic() + self._config.learner.timeout_s
        waiting: list[ObjectRef] = list(refs)
        failures: dict[int, RayError] = {}
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not done and not failures:
                raise self._late(what, sorted(refs.index(ref) for ref in waiting))
            if not done:
                break
            try:
                ray.get(done[0])
            except RayError as error:
                failures[refs.index(done[0])] = error
                deadline = min(deadline, time.monotonic() + BLAME_S)  # the others fail too; whose fault is it?
        if failures:
            raise _blame(what, failures, self._hosts)
        return ray.get(list(refs))


def _blame(what: str, failures: dict[int, RayError], hosts: Sequence[str]) -> Exception:
    """The error of the rank at fault: a dead one, else one with an error of its own, else any that lost its peers.

    DataLost where what a rank was given is gone.
    """
    for rank, error in failures.items():
        if isinstance(error, RayActorError) and lost_data(error) is None:
            reason = str(error).strip().splitlines()[0]
            return LearnerLost(f"learner rank {rank} on {hosts[rank]} died during {what!r}: {reason}")
    for error in failures.values():
        if (lost := lost_data(error)) is not None:
            return lost
    own = [error for error in failures.values() if PEER_LOST not in str(error)]
    return own[0] if own else LearnerLost(str(next(iter(failures.values()))))
