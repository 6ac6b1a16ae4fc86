"""Memory of the processes that compute on a CPU."""

import ctypes
import os

_COMPILED_PRODUCTS = "64"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 2**30


def tune_host_memory() -> None:
    """Settings for shapes that never repeat; call it before the first tensor is computed."""
    _keep_freed_memory()
    _forget_compiled_products()


def _keep_freed_memory() -> None:
    """Let the C library keep what tensors free, instead of returning it to the system and faulting it in anew.

    Every layer allocates and frees megabytes; without this their first touch costs more than computing them in a
    rollout, and a third of a learner's step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, _KEEP_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _KEEP_BYTES)


def _forget_compiled_products() -> None:
    """Let oneDNN keep the code of few products: by default it is 1,024, one for every shape, and hundreds of megabytes
    after some dozen steps. The user's own setting stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _COMPILED_PRODUCTS)


def return_freed_memory() -> None:
    """Give the system what the C library has kept so far: after loading, when no tensor will need that much again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
