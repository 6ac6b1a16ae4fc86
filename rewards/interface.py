"""The two ways to write a reward, and the one way they are run.

A function scores one group:            def my_reward(group: Group, **args) -> list[float]
A class has state and scores a table:   class MyReward:
                                            def __init__(self, catalog: TitleCatalog, **args): ...
                                            def __call__(self, groups: Groups) -> list[list[float]]: ...

Both return one finite float per candidate, in the order of the candidates.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa

from catalog.own_code import traceback_below
from rewards.errors import RewardError, name_examples
from rewards.group import Group, Groups, TitleCatalog

Returned: TypeAlias = Sequence[Sequence[float] | np.ndarray] | np.ndarray | pa.Array | pa.ChunkedArray


class Reward(Protocol):
    """One sequence of floats per group, rank 0 first. Whole-table rewards may return a list<float32> array instead.

    A class with `light = True` takes microseconds per group, and shares one actor with the other light terms.
    """

    def __call__(self, groups: Groups) -> Returned: ...


class PerGroup:
    """A plain function of one group as a reward of a whole table."""

    def __init__(self, name: str, function: Callable[..., Sequence[float]], args: dict[str, Any]) -> None:
        self.name = name
        self.function = function
        self.args = args

    def __call__(self, groups: Groups) -> Returned:
        return [self._one(group) for group in groups]

    def _one(self, group: Group) -> Sequence[float]:
        try:
            return self.function(group, **self.args)
        except (Exception, SystemExit) as error:
            raise _raised(self.name, [group.example_id], error) from error


def make_reward(name: str, written: Any, catalog: TitleCatalog, args: dict[str, Any]) -> Reward:
    """The reward that a function or class stands for. Raises RewardError when the class cannot be made from `args`."""
    check_written(name, written, args)
    return _instance(name, written, catalog, args) if inspect.isclass(written) else PerGroup(name, written, args)


def _instance(name: str, written: Callable[..., Any], catalog: TitleCatalog, args: dict[str, Any]) -> Reward:
    try:
        reward: Reward = written(catalog, **args)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"reward {name!r} could not be made with args {args}:\n{traceback_below(error, __file__)}"
        ) from error
    return reward


def score(name: str, reward: Reward, groups: Groups) -> pa.ListArray:
    """list<float32> of one row per group.

    Raises RewardError with the groups' example ids when the reward raises or returns anything else than one finite
    float per candidate.
    """
    try:
        returned = reward(groups)
        if isinstance(returned, Iterator):
            returned = list(returned)  # what is written with yield runs only now
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise _raised(name, groups.example_ids.tolist(), error) from error
    given = _flat_values(name, returned, groups)
    with np.errstate(over="ignore"):
        values = given.astype(np.float32, copy=False)
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        candidate = int(wrong[0])
        example_id = int(groups.example_ids[groups.layout.group[candidate]])
        raise RewardError(
            f"reward {name!r} gave {given[candidate]} to the candidate at rank {groups.layout.rank[candidate]} of "
            f"group {example_id}; every reward must be a finite float32"
        )
    return groups.layout.column(values)


def _flat_values(name: str, returned: Any, groups: Groups) -> np.ndarray:
    """[N]: what a reward returned for all candidates of a table."""
    if isinstance(returned, pa.ListArray) and _is_one_number_each(returned, groups):
        return groups.layout.flat(returned)
    if isinstance(returned, pa.Array | pa.ChunkedArray):
        returned = returned.to_pylist()
    try:
        rows = list(returned)
    except TypeError:
        raise RewardError(
            f"reward {name!r} returned {_shown(returned)} for {len(groups)} groups; expected a list for each"
        ) from None
    if len(rows) != len(groups):
        kind = "numbers" if rows and isinstance(rows[0], Real) else "lists"
        raise RewardError(
            f"reward {name!r} returned {len(rows)} {kind} for {len(groups)} groups "
            f"({name_examples(groups.example_ids.tolist())}); expected a list for each"
        )
    return np.concatenate([np.zeros(0), *(_row(name, row, groups, index) for index, row in enumerate(rows))])


def _is_one_number_each(lists: pa.ListArray, groups: Groups) -> bool:
    if lists.null_count or lists.values.null_count:
        return False
    numbers = pa.types.is_floating(lists.type.value_type) or pa.types.is_integer(lists.type.value_type)
    return numbers and np.array_equal(lists.value_lengths().to_numpy(), groups.layout.sizes)


def _row(name: str, row: Any, groups: Groups, index: int) -> np.ndarray:
    size = int(groups.layout.sizes[index])
    try:
        values = np.asarray(row.detach().float().cpu() if hasattr(row, "detach") else row)
        if values.dtype == object and all(isinstance(value, Real) for value in values.flat):
            values = values.astype(np.float64)  # numpy has no integers from 2^64 on
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a list of tensors that have gradients
        values = np.asarray(None)
    if values.shape != (size,) or (size and values.dtype.kind not in "biuf"):
        found = f"{len(row)} values ({_shown(row)})" if isinstance(row, Sequence | np.ndarray) else _shown(row)
        raise RewardError(
            f"reward {name!r} returned {found} for group {groups.example_ids[index]}, which has {size} candidates; "
            "expected one float for each"
        )
    return values


def check_written(name: str, written: Any, args: dict[str, Any]) -> None:
    """Raise RewardError for what is no function or class, or does not take `args`; makes nothing of it."""
    if not callable(written):
        raise RewardError(f"reward {name!r} is {_shown(written)}; it must be a function of one group or a class")
    if inspect.isclass(written) and not any("__call__" in vars(kind) for kind in written.__mro__):
        raise RewardError(f"reward {name!r}: class {written.__name__} needs a method __call__(self, groups)")
    if inspect.iscoroutinefunction(written.__call__ if inspect.isclass(written) else written):
        raise RewardError(
            f"reward {name!r} is async; write a plain function or class that runs its coroutines with asyncio.run. "
            "Terms work in actors of their own, beside each other and the next rollouts"
        )
    try:
        signature = inspect.signature(written)
    except ValueError:
        return
    if inspect.isclass(written) and next(iter(signature.parameters), None) != "catalog":
        raise RewardError(
            f"reward {name!r}: {written.__name__} is made as {written.__name__}(catalog, **args), so that the first "
            f"parameter of its __init__ must be called catalog; it takes {signature}"
        )
    try:
        signature.bind(None, **args)
    except TypeError as error:
        raise RewardError(f"reward {name!r}: {error}; args are {args}, and it takes {signature}") from None


def _raised(name: str, example_ids: list[int], error: BaseException) -> RewardError:
    return RewardError(f"reward {name!r} raised on {name_examples(example_ids)}:\n{traceback_below(error, __file__)}")


def _shown(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."
