"""Waits for remote results, each with a limit and a name."""

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from rollout.restarts import lost_data


class WaitTimeout(TimeoutError):
    """Something that is usually quick was not done in time."""


def fetch(ref: ray.ObjectRef, timeout_s: float, what: str) -> Any:
    """The result of `ref`. Raises WaitTimeout naming `what`, DataLost, or what the task raised."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError as error:
        raise WaitTimeout(
            f"{what} is not done after {timeout_s:g} s; is the cluster short of memory or cores?"
        ) from error
    except (ObjectLostError, RayActorError) as error:
        if (lost := lost_data(error)) is not None:
            raise lost from error
        raise
