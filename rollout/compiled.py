"""Loops over single beams, compiled by numba: to tensors each would be a hundred operations on a few numbers."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from llvmlite.binding import ffi

getattr(ffi.lib, "_fntab", {}).setdefault("__dict__", {})
"""vLLM 0.32, as it starts on a CPU, asks whatever a module holds for its attributes, and would be given a function of
that name by numba's LLVM."""

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compiled when it is first called, and kept in __pycache__ or in the user's cache folder."""
    try:
        return cast(Function, numba.njit(cache=True)(function))
    except RuntimeError:  # no such folder can be written
        return cast(Function, numba.njit(function))
