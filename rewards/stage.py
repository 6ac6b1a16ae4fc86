"""The actors of one reward term: which of them takes a table, and how long one may take."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayActorError, RayError, RayTaskError

from rewards.actor import RewardActor
from rewards.config import RewardTerm
from rewards.errors import RewardError, RewardTimeoutError, name_examples
from rewards.terms import replicas_of
from rollout.restarts import START_TIMEOUT_S, lost_data, restarts

FETCH_TIMEOUT_S = 30.0
RETRIES = 2
"""How often one table is scored again after the actor that held it died."""


@dataclass(frozen=True, eq=False)
class Work:
    """A table that a replica has been given."""

    replica: "Replica"
    table: ObjectRef
    done: ObjectRef
    """What the replica returns for it."""
    inputs: Sequence["Work"] = ()
    """What other replicas must do first."""

    def value(self) -> Any:
        """What the replica returned. Raises RewardError for whatever went wrong in it or in one of the inputs.

        DataLost where the table is gone.
        """
        try:
            return ray.get(self.done, timeout=self.replica.stage.timeout_s)
        except RayError as error:
            for work in self.inputs:
                work.value()
            raise lost_data(error) or self._failure(error) from None

    def groups(self) -> str:
        """The groups of the table, for messages; the only place where the driver fetches one."""
        try:
            return name_examples(ray.get(self.table, timeout=FETCH_TIMEOUT_S)["example_id"].to_pylist())
        except RayError:
            return "groups whose table is lost"

    def _failure(self, error: RayError) -> RewardError:
        names = self.replica.stage.names
        if plain := _plain(error):
            return plain
        if isinstance(error, RayActorError):
            return RewardError(f"reward {names}: its actor died {RETRIES + 1} times over {self.groups()}: {error}")
        return RewardError(f"reward {names} failed on {self.groups()}: {error}")


class Replica:
    """One actor and the tables it has been given; it takes them one after another, in that order."""

    def __init__(self, actor: Any, stage: "Stage") -> None:
        self.actor = actor
        self.stage = stage
        self.queue: deque[Work] = deque()
        self._restarts = 0
        """Those that a wait has made allowance for."""

    def drop_finished(self) -> None:
        if not self.queue:
            return
        refs = [work.done for work in self.queue]
        finished = set(ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[0])
        while self.queue and self.queue[0].done in finished:
            self.queue.popleft()

    def wait(self, work: Work) -> None:
        """Return when `work` is done. Raises RewardTimeoutError when it, or a table before it, takes too long.

        The clock of a table starts when the one before it is finished, so that a long queue is no time-out; and anew
        where the actor has been started again meanwhile, which then has to load its models.
        """
        while work in self.queue:
            head = self.queue[0]
            for needed in head.inputs:
                needed.replica.wait(needed)
            patience, deaths = self.stage.timeout_s, 0
            while not ray.wait([head.done], timeout=patience, fetch_local=False)[0]:
                known, deaths = restarts(self.actor), deaths + 1
                if known == self._restarts or deaths > RETRIES:
                    raise self.stage.late(head, patience)
                self._restarts = known
                patience = self.stage.start_timeout_s + self.stage.timeout_s
            self.queue.popleft()


class Stage:
    """The replicas that compute the same terms.

    Ray restarts a replica that dies, as often as it happens, and has the tables it held scored again.
    """

    def __init__(self, terms: Sequence[RewardTerm], catalog_path: str, root: str) -> None:
        self.terms = terms
        self.start_timeout_s = START_TIMEOUT_S
        self.timeout_s = max((term.timeout_s for term in terms), default=RewardTerm().timeout_s)
        reserved = replicas_of(terms)
        make = ray.remote(RewardActor).options(
            num_cpus=reserved[0]["CPU"],
            num_gpus=reserved[0]["GPU"],
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        self.replicas = [Replica(make.remote(terms, catalog_path, root), self) for _ in reserved]

    @property
    def names(self) -> str:
        """The terms, for messages."""
        return " + ".join(repr(term.key) for term in self.terms) or "the sum of the rewards"

    def least_loaded(self) -> Replica:
        """The replica with the fewest unfinished tables."""
        for replica in self.replicas:
            replica.drop_finished()
        return min(self.replicas, key=lambda replica: len(replica.queue))

    @property
    def queued(self) -> int:
        """Tables given to the replicas and not finished when last looked at."""
        return sum(len(replica.queue) for replica in self.replicas)

    def late(self, work: Work, waited_s: float) -> RewardTimeoutError:
        waiting = len(work.replica.queue)
        return RewardTimeoutError(
            f"reward {self.names} gave no answer for {work.groups()} within {waited_s:g} s; "
            f"{waiting} {'table waits' if waiting == 1 else 'tables wait'} for its actor. "
            "If it is slow and not stuck, raise its timeout_s or its replicas"
        )

    def check_ready(self, ready: ObjectRef) -> None:
        """Raise the RewardError that kept a replica from getting ready, if any did."""
        try:
            ray.get(ready)
        except RayError as error:
            raise _plain(error) or RewardError(f"reward {self.names} could not start: {error}") from None

    def close(self) -> None:
        for replica in self.replicas:
            ray.kill(replica.actor)


def _plain(error: RayError) -> RewardError | None:
    """The RewardError that an actor raised, without Ray's wrapping."""
    return error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, RewardError) else None
