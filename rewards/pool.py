"""All reward terms of a run, as the driver sees them: references go in, references come out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from rewards.config import RewardTerm
from rewards.errors import RewardError, RewardTimeoutError
from rewards.stage import Stage, Work
from rewards.terms import stages_of
from rollout.restarts import lost_data

METRICS_TIMEOUT_S = 600.0
"""Longest wait for the metrics of one step, whose tables are scored already."""


@dataclass(frozen=True)
class Handle:
    """A table on its way through the rewards."""

    scored: ObjectRef
    """The table with its rewards, once they are there."""
    work: Work
    """Of the actor that adds the terms up; `work.value()` is the seconds that each term took."""


class RewardPool:
    """Scores group tables in actors while the driver does other things.

    >>> pool = RewardPool(config.rewards, catalog_path)    # finds every reward, or says which it cannot find
    >>> pool.start()                                       # actors start while other things do
    >>> pool.ready(timeout_s=300)                          # models are loaded, connections open
    >>> handles = [pool.submit(table_ref, "train") for table_ref in stream]
    >>> scored = list(pool.results(handles))               # references, in the order of the handles
    >>> metrics = pool.metrics(scored)
    >>> pool.close()

    A scored table has the columns of the groups, `reward/<term>` (list<float32>) for every term, and `reward`, their
    weighted sum. Terms run in parallel; light ones (rule, ranking) share the actor that adds up, so that they cost one
    hop. A term that raises, hangs or returns nonsense surfaces in `results` as a RewardError.
    """

    def __init__(self, terms: Sequence[RewardTerm], catalog_path: str | Path) -> None:
        """Raises RewardError as rewards.terms.stages_of."""
        self._terms = stages_of(terms)
        self.catalog_path = str(catalog_path)
        self.root = str(Path.cwd())
        self.weights = {term.key: term.weight for term in terms}
        self._heavy: list[Stage] = []
        self._combining: Stage | None = None
        self._seconds: dict[str, float] = {}
        self._queued: dict[str, int] = {}

    def start(self) -> "RewardPool":
        """Create the actors; does not wait for them."""
        *self._heavy, self._combining = [Stage(terms, self.catalog_path, self.root) for terms in self._terms]
        return self

    def ready(self, timeout_s: float) -> None:
        """Wait until every actor has loaded what it needs. Raises RewardError that names the term."""
        for stage in self._stages:
            stage.start_timeout_s = timeout_s  # after a death, too
        waiting = {replica.actor.ready.remote(): stage for stage in self._stages for replica in stage.replicas}
        done, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s)
        for ref in done:
            waiting[ref].check_ready(ref)
        if late:
            names = ", ".join(sorted({waiting[ref].names for ref in late}))
            raise RewardTimeoutError(
                f"reward {names} is not ready after {timeout_s:g} s; raise cluster.start_timeout_s if it is only slow"
            )

    def submit(self, table: ObjectRef, split: str) -> Handle:
        """Have the groups of `table`, examples of `split`, scored; returns at once."""
        inputs = []
        for stage in self._heavy:
            replica = stage.least_loaded()
            inputs.append(self._note(Work(replica, table, replica.actor.score.remote(table, split))))
        replica = self._stages[-1].least_loaded()
        scored, seconds = replica.actor.combine.options(num_returns=2).remote(
            table, split, self.weights, *(work.done for work in inputs)
        )
        return Handle(scored, self._note(Work(replica, table, seconds, inputs)))

    def results(self, handles: Iterable[Handle]) -> Iterator[ObjectRef]:
        """References to the scored tables, in order, each as soon as it is there. Raises RewardError."""
        for handle in handles:
            yield self.result(handle)

    def result(self, handle: Handle) -> ObjectRef:
        """Wait for one table. Raises RewardError, or RewardTimeoutError when a term exceeds its timeout_s."""
        handle.work.replica.wait(handle.work)
        for key, seconds in handle.work.value().items():
            self._seconds[key] = self._seconds.get(key, 0.0) + seconds
        return handle.scored

    def metrics(self, scored: Sequence[ObjectRef]) -> dict[str, float]:
        """Of the scored tables, reward_metrics and rollout_metrics; and what the terms cost since the last call.

        rewards/<name>/seconds: time in the term's actors. rewards/<name>/queue: most tables that waited for them.
        Raises DataLost where a table is gone.
        """
        computing = self._stages[-1].least_loaded().actor.metrics.remote(*scored)
        try:
            metrics = dict(ray.get(computing, timeout=METRICS_TIMEOUT_S))
        except GetTimeoutError as error:
            raise RewardTimeoutError(
                f"the metrics of a step's rewards are not there after {METRICS_TIMEOUT_S:g} s"
            ) from error
        except (ObjectLostError, RayActorError) as error:
            if (lost := lost_data(error)) is not None:
                raise lost from error
            raise
        metrics |= {f"rewards/{key}/seconds": seconds for key, seconds in self._seconds.items()}
        metrics |= {f"rewards/{key}/queue": float(queued) for key, queued in self._queued.items()}
        self._seconds, self._queued = {}, {}
        return metrics

    def close(self) -> None:
        """End the actors."""
        for stage in self._heavy + ([self._combining] if self._combining else []):
            stage.close()
        self._heavy, self._combining = [], None

    @property
    def _stages(self) -> list[Stage]:
        if self._combining is None:
            raise RewardError("the reward actors do not run; call RewardPool.start() first")
        return [*self._heavy, self._combining]

    def _note(self, work: Work) -> Work:
        """Put `work` in its replica's queue and remember how long the queue of each term has been."""
        work.replica.queue.append(work)
        stage = work.replica.stage
        for term in stage.terms:
            self._queued[term.key] = max(self._queued.get(term.key, 0), stage.queued)
        return work
