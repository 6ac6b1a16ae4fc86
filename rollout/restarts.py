"""What dies while the driver waits for it: the limits of waiting, the errors, and how a worker comes back."""

import logging
import time

import ray
from ray._private import state
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    LocalRayletDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)

from rollout.published_weights import PublishedWeights

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
RAY_TIMEOUT_S = 60.0
RESTART_POLL_S = 0.25
MAX_DEATHS = 3
"""Of a worker at one table, or while it starts, for the first time or again."""


class RolloutTimeout(TimeoutError):
    """A rollout worker let the driver wait too long."""


class WorkerLost(RuntimeError):
    """A rollout worker died and could not be brought back."""


class Deadline:
    """The end of a wait for rollout workers, and the error of what is not there by then."""

    def __init__(self, seconds: float, keys: str) -> None:
        """keys: those to raise for more."""
        self._seconds, self._keys = seconds, keys
        self._end = time.monotonic() + seconds

    @classmethod
    def of_restart(cls, timeout_s: float, start_timeout_s: float) -> "Deadline":
        """Of a worker whose new process starts its engine before it does what it otherwise has timeout_s for."""
        return cls(start_timeout_s + timeout_s, "cluster.start_timeout_s or rollout.timeout_s, whose sum that is,")

    @property
    def left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def passed(self, what: str) -> RolloutTimeout:
        """what: "rollout worker 0 is not ready"."""
        return RolloutTimeout(
            f"{what} after {self._seconds:g} s; raise {self._keys} if that is only slow (Ray's "
            "session_latest/logs/worker-* tell)"
        )


class DataLost(RuntimeError):
    """Tables or weights went with the node that held them; the steps after the last checkpoint have to be repeated."""


class RayLost(RuntimeError):
    """Ray has died on the driver's machine, so that nothing can be started from here any more."""

    def __init__(self) -> None:
        super().__init__(
            "Ray's raylet on this machine has died, and with it all that it had started; the machine may have run out "
            "of memory (Ray's session_latest/logs/raylet.out says). RESUME=1 goes on from the last checkpoint"
        )


def check_ray() -> None:
    """Raise RayLost where that is so: what is started again after a death would be waited for in vain."""
    try:
        ray.get(_nothing.remote(), timeout=RAY_TIMEOUT_S)
    except LocalRayletDiedError as error:
        raise RayLost from error
    except RayError:
        pass  # something else, which the caller will see


@ray.remote(num_cpus=0)
def _nothing() -> None:
    pass


def lost_data(error: Exception) -> DataLost | None:
    """What stands for an error of Ray's that says that data are gone; None for any other.

    A call that runs, and yet fails because an actor is dead, lacks an argument that this actor was still making.
    """
    if isinstance(error, ObjectLostError) or (isinstance(error, RayTaskError) and isinstance(error, RayActorError)):
        reason = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        return DataLost(f"data were lost with the node that held them ({reason[-1]})")
    return None


def bring_back(
    worker: ActorHandle, weights: PublishedWeights | None, timeout_s: float, start_timeout_s: float, name: str
) -> None:
    """Wait for a dead worker's restart, which the log is told of, and give it its weights.

    Both together may take start_timeout_s, as a first start may, and timeout_s more.
    Raises RolloutTimeout naming it, WorkerLost when it stays dead or dies MAX_DEATHS times meanwhile, DataLost when
    its weights are gone, or RayLost.
    """
    deadline, deaths = Deadline.of_restart(timeout_s, start_timeout_s), 0
    while True:
        await_restart(worker, deadline, name)
        try:
            _wait_for(worker.ready.remote(), deadline, f"{name}: restart is not done")
            if weights is not None:
                reload = f"{name}: reload of version {weights.version} is not done"
                _wait_for(weights.load(worker), deadline, reload)
            return
        except RayActorError as death:
            deaths += 1
            if deaths == MAX_DEATHS:
                raise keeps_dying(name, "it was started again", death) from death


def await_restart(worker: ActorHandle, deadline: Deadline, name: str) -> None:
    """Wait until a dead worker's new process answers: before, every call fails as if it died anew.

    Raises RolloutTimeout naming it, WorkerLost when it stays dead, or RayLost where nothing can be restarted.
    """
    check_ray()
    logger.warning("%s: its process has ended; waiting for a new one", name)
    late = f"{name}: restart is not done"
    while True:
        try:
            _wait_for(worker.health.remote(), deadline, late)
            return
        except ActorUnavailableError as error:
            if not deadline.left_s:
                raise deadline.passed(late) from error
            time.sleep(RESTART_POLL_S)
        except RayActorError as error:
            raise WorkerLost(f"{name}: died and was not restarted ({first_line(error)})") from error


def _wait_for(answer: ray.ObjectRef, deadline: Deadline, late: str) -> None:
    """Raises RolloutTimeout that begins with `late`, DataLost, or what the answer stands for."""
    try:
        ray.get(answer, timeout=deadline.left_s)
    except GetTimeoutError as error:
        raise deadline.passed(late) from error
    except (ObjectLostError, RayActorError) as error:
        if (lost := lost_data(error)) is not None:
            raise lost from error
        raise


def keeps_dying(name: str, when: str, death: Exception) -> WorkerLost:
    """The error of a worker that has died MAX_DEATHS times before it could do anything."""
    return WorkerLost(
        f"{name} died {MAX_DEATHS} times while {when} ({first_line(death)}); Ray's logs of its processes "
        "(session_latest/logs/worker-*) say why"
    )


def restarts(actor: ActorHandle) -> int:
    """How often Ray has started an actor again."""
    return int(state.actors(actor_id=actor._actor_id.hex())["NumRestarts"])


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
