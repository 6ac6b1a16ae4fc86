"""Rewards that go wrong, each in one way, for the tests of what happens then."""

import os
import signal
import time
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import torch

from rewards.group import Group, Groups
from rewards.interface import Returned

BAD_EXAMPLE = 2


def title_length(group: Group) -> list[float]:
    """Nothing goes wrong here."""
    return [len(title) / 100 for title in group.candidate_titles]


def tensors_in_bfloat16(group: Group) -> torch.Tensor:
    """As a reward model gives them."""
    return torch.tensor(group.scores, dtype=torch.bfloat16)


def tensors(group: Group) -> torch.Tensor:
    """Nor here."""
    return torch.tensor(group.scores, requires_grad=True) + 0


def raises(group: Group) -> list[float]:
    if group.example_id == BAD_EXAMPLE:
        raise KeyError("no price for " + group.candidate_titles[0])
    return title_length(group)


def not_a_number(group: Group) -> list[float]:
    rewards = title_length(group)
    return [*rewards[:-1], float("nan")] if group.example_id == BAD_EXAMPLE else rewards


def too_large(group: Group) -> list[float]:
    return [1e300 for _ in group.candidate_titles]


def large_integers(group: Group) -> list[int]:
    """Too large for 64 bits, and fine."""
    return [10**20 + rank for rank in range(len(group.candidate_titles))]


def too_large_integers(group: Group) -> list[int]:
    """For any float."""
    return [10**400 for _ in group.candidate_titles]


def one_short(group: Group) -> list[float]:
    return title_length(group)[:-1] if group.example_id == BAD_EXAMPLE else title_length(group)


def one_number(group: Group) -> float:
    return 1.0


def nothing(group: Group) -> None:
    title_length(group)


def words(group: Group) -> list[str]:
    return group.candidate_titles


async def coroutine(group: Group) -> list[float]:
    return title_length(group)


def exits(group: Group) -> list[float]:
    raise SystemExit(3)


class Constant:
    """The same reward for everybody, after a while."""

    def __init__(self, catalog: object, value: float = 1.0, seconds: float = 0.0) -> None:
        self.value = value
        self.seconds = seconds

    def __call__(self, groups: Groups) -> Returned:
        time.sleep(self.seconds)
        return [[self.value] * len(group.scores) for group in groups]


class Meets(Constant):
    """Waits until `count` of its kind hold a table at the same time."""

    def __init__(self, catalog: object, folder: str, count: int) -> None:
        super().__init__(catalog)
        self.folder = Path(folder)
        self.count = count

    def __call__(self, groups: Groups) -> Returned:
        (self.folder / uuid4().hex).touch()
        deadline = time.monotonic() + 30
        while len(list(self.folder.iterdir())) < self.count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited for {self.count}, met {len(list(self.folder.iterdir()))}")
            time.sleep(0.02)
        return super().__call__(groups)


class YieldsAndRaises(Constant):
    def __call__(self, groups: Groups) -> Returned:
        for group in groups:
            yield [len(title) + None for title in group.candidate_titles]


class Yields(Constant):
    """Nothing goes wrong here either."""

    def __call__(self, groups: Groups) -> Returned:
        for group in groups:
            yield [1.0] * len(group.candidate_titles)


class OneGroupShort(Constant):
    def __call__(self, groups: Groups) -> Returned:
        return [[1.0] * len(group.scores) for group in groups][1:]


class AsyncCall(Constant):
    async def __call__(self, groups: Groups) -> Returned:  # type: ignore[override]
        return [[0.0] * len(group.candidate_titles) for group in groups]


class Meddles(Constant):
    """Works in place on what it is given, in the actor of the light terms."""

    light = True

    def __call__(self, groups: Groups) -> Returned:
        returned = super().__call__(groups)
        np.negative(groups.layout.rank, out=groups.layout.rank)
        groups.table = groups.table.take(list(range(len(groups)))[::-1])
        return returned


class Flat(Constant):
    def __call__(self, groups: Groups) -> Returned:
        return np.ones(groups.layout.num_candidates)


class AsArrow(Constant):
    """Nothing goes wrong here either."""

    def __call__(self, groups: Groups) -> Returned:
        return pa.array(super().__call__(groups), pa.list_(pa.float64()))


class AsLargeArrow(Constant):
    def __call__(self, groups: Groups) -> Returned:
        return pa.array(super().__call__(groups), pa.large_list(pa.float32()))


class ChunkedScores(Constant):
    def __call__(self, groups: Groups) -> Returned:
        return groups.table["score"]


class ArrowWords(Constant):
    def __call__(self, groups: Groups) -> Returned:
        return pa.array([group.candidate_titles for group in groups])


class CannotStart:
    def __init__(self, catalog: object) -> None:
        raise FileNotFoundError("weights.bin")

    def __call__(self, groups: Groups) -> Returned:
        return []


class WithoutCatalog(Constant):
    def __init__(self, value: float = 1.0) -> None:
        self.value = value


class NotCallable:
    def __init__(self, catalog: object) -> None:
        pass


class DiesOnce(Constant):
    """Its process is killed while it holds a table, unless `mark` says that this has happened before; then it takes
    `loads_s` to be made."""

    def __init__(self, catalog: object, mark: str, loads_s: float = 0.0) -> None:
        super().__init__(catalog)
        self.mark = Path(mark)
        time.sleep(loads_s if self.mark.exists() else 0.0)

    def __call__(self, groups: Groups) -> Returned:
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(groups)


class DiesLoadingAgain(DiesOnce):
    """The same, and then each time that it is made."""

    def __init__(self, catalog: object, mark: str) -> None:
        super().__init__(catalog, mark)
        if self.mark.exists():
            os.kill(os.getpid(), signal.SIGKILL)


class DiesAlways(Constant):
    def __call__(self, groups: Groups) -> Returned:
        os.kill(os.getpid(), signal.SIGKILL)
        return []
