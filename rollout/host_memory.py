"""Memory of the processes that compute on a CPU: the allocator they start with, and what they give back."""

import ctypes
import mmap
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WORTH_RETURNING = 2**28
"""Bytes of weights from which on memory that rests is worth the time that touching it anew takes."""

COMPILED_PRODUCTS = 64
"""Whose code oneDNN keeps, by default; each takes a third of a MiB."""

_ALLOCATOR = "narenas:1,oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1,lg_extent_max_active_fit:30"
_ALL_ARENAS = 4096
_MADV_DONTNEED = 4


def host_environment(compiled_products: int = COMPILED_PRODUCTS) -> dict[str, str]:
    """What such a process must start with; the user's own settings stay.

    The allocator is jemalloc, which Ray brings along. Every layer allocates and frees megabytes, and no two steps have
    the same shapes: the C library's aligned allocation cannot even reuse a block of equal size, gives large ones back
    to the system in every thread but the first, and the first touch of a page costs more than computing its contents.
    jemalloc here keeps what is freed, large blocks too and for all threads, and splits a free block for any request.
    By its default it splits none for less than a 64th of it: a process of ever new shapes would grow without end.

    oneDNN keeps the code of `compiled_products`: by its default of 1,024, one for every shape, they are hundreds of
    megabytes after some dozen steps.
    """
    settings = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(compiled_products)}
    ray = find_spec("ray")
    library = Path(ray.origin or "").parent / "core/libjemalloc.so" if ray else Path()
    if library.is_file() and "LD_PRELOAD" not in os.environ:
        settings |= {"LD_PRELOAD": str(library), "MALLOC_CONF": _ALLOCATOR}
    return {name: value for name, value in settings.items() if name not in os.environ}


def return_freed_memory() -> None:
    """Give the system what the allocator has kept so far: when no tensor will soon need that much again."""
    process = ctypes.CDLL(None)
    if hasattr(process, "mallctl"):
        process.mallctl(f"arena.{_ALL_ARENAS}.purge".encode(), None, None, None, ctypes.c_size_t(0))
    elif hasattr(process, "malloc_trim"):
        process.malloc_trim(0)


def discard_contents(tensor: "torch.Tensor") -> None:
    """Give the system the whole pages of a CPU tensor's storage; it stays where it is, but what it holds is lost."""
    storage = tensor.untyped_storage()
    first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (storage.data_ptr() + storage.nbytes() - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_DONTNEED)
