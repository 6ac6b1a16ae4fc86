"""The actors of one reward term: which of them takes a table, and how long one may take."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef

from rewards.actor import RewardActor
from rewards.config import RewardTerm
from rewards.errors import RewardTimeoutError, name_examples

RETRIES = 2
"""How often one table is scored again after the actor that held it died."""


@dataclass(frozen=True)
class Pending:
    """A table that a replica has been given."""

    done: ObjectRef
    """Ready when the table is scored."""
    table: ObjectRef
    inputs: Sequence[tuple["Replica", ObjectRef]]
    """What must be done first, by other replicas."""


class Replica:
    """One actor and the tables it has been given; it takes them one after another, in that order."""

    def __init__(self, actor: Any, stage: "Stage") -> None:
        self.actor = actor
        self.stage = stage
        self.pending: deque[Pending] = deque()

    def drop_finished(self) -> None:
        if not self.pending:
            return
        refs = [entry.done for entry in self.pending]
        finished = set(ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[0])
        while self.pending and self.pending[0].done in finished:
            self.pending.popleft()

    def wait(self, done: ObjectRef) -> None:
        """Return when `done` is ready. Raises RewardTimeoutError when any table before it, or its own, takes too long.

        The clock of a table starts when the one before it is finished, so that a long queue is no time-out.
        """
        while any(entry.done == done for entry in self.pending):
            head = self.pending[0]
            for replica, input_done in head.inputs:
                replica.wait(input_done)
            if not ray.wait([head.done], timeout=self.stage.timeout_s, fetch_local=False)[0]:
                raise self.stage.late(head, len(self.pending))
            self.pending.popleft()


class Stage:
    """The replicas that compute the same terms.

    Ray restarts a replica that dies, as often as it happens, and has the tables it held scored again.
    """

    def __init__(self, terms: Sequence[RewardTerm], catalog_path: str, root: str) -> None:
        self.terms = terms
        self.timeout_s = max((term.timeout_s for term in terms), default=RewardTerm().timeout_s)
        make = ray.remote(RewardActor).options(
            num_cpus=sum(term.num_cpus for term in terms),
            num_gpus=sum(term.num_gpus for term in terms),
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        count = max((term.replicas for term in terms), default=1)
        self.replicas = [Replica(make.remote(terms, catalog_path, root), self) for _ in range(count)]

    @property
    def names(self) -> str:
        """The terms, for messages."""
        return " + ".join(repr(term.key) for term in self.terms) or "the sum of the rewards"

    def least_loaded(self) -> Replica:
        """The replica with the fewest unfinished tables."""
        for replica in self.replicas:
            replica.drop_finished()
        return min(self.replicas, key=lambda replica: len(replica.pending))

    @property
    def queue(self) -> int:
        """Tables given to the replicas and not finished when last looked at."""
        return sum(len(replica.pending) for replica in self.replicas)

    def late(self, entry: Pending, queued: int) -> RewardTimeoutError:
        example_ids = ray.get(entry.table)["example_id"].to_pylist()
        return RewardTimeoutError(
            f"reward {self.names} gave no answer for {name_examples(example_ids)} within {self.timeout_s:g} s; "
            f"{queued} tables wait for that actor. If it is slow and not stuck, raise its timeout_s or its replicas"
        )

    def close(self) -> None:
        for replica in self.replicas:
            ray.kill(replica.actor)
