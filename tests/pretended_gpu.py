"""A CUDA device where there is none: tensors that say they are on `cuda:0` and compute in the host's memory.

What a GPU refuses is refused: operations on tensors of both devices, and handing values to numpy. What makes the host
wait for a GPU is counted: values that it wants, and copies in either direction that are not said to be `non_blocking`.
So code for a GPU can be run and its results compared; kernels, streams and speed cannot.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

CUDA = torch.device("cuda", 0)
_TRANSFERS = {"to", "cpu", "cuda", "copy_"}
_SENDS = {"to", "cuda", "tensor", "as_tensor"}
_WAITS = {"item", "tolist", "nonzero", "masked_select", "unique", "equal", "allclose", "argwhere"}
_WAITS |= {"__bool__", "__int__", "__float__", "__index__"}
_ABOUT_PLACE = {"device": CUDA, "is_cuda": True, "is_cpu": False}


class PretendedTensor(torch.Tensor):
    """Says it is on the GPU; `host` holds its values, and shares memory as the GPU's tensors would."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "PretendedTensor":
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, host.shape, device=CUDA, **layout)
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} reads the values of a tensor of the GPU")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(None, func, args, kwargs or {})


class PretendedGpu(TorchFunctionMode):
    """While it is entered, device "cuda" is a pretended one."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """What the host has waited for the device for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(self, func, args, kwargs or {})


def _run(gpu: PretendedGpu | None, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    name = func.__name__
    if func is torch.device:
        return func(*args, **kwargs)
    tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
    if name == "__get__" and here and (about := func.__self__.__name__) in _ABOUT_PLACE:
        return _ABOUT_PLACE[about]
    if name == "pin_memory":
        return args[0]
    if name == "empty":
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    target = _target(name, args, kwargs)
    strangers = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, PretendedTensor) and tensor.ndim]
    if here and strangers and name not in _TRANSFERS:  # a GPU takes single numbers of the host
        raise RuntimeError(f"{name}: tensors of the host, of shapes {strangers}, beside those of the GPU")
    if name == "numpy" and here:
        raise TypeError("numpy cannot read a tensor of the GPU")
    if gpu is not None and (_waits(name, args, kwargs, target) if here else _sends(name, kwargs, target)):
        gpu.waits.append(name)
    found = func(*tree_map(_host, args), **tree_map(_host, kwargs))
    if name in _TRANSFERS and target is not None and isinstance(found, torch.Tensor):
        found = found.clone()
    if isinstance(found, torch.Tensor) and ((name.endswith("_") and not name.endswith("__")) or "out" in kwargs):
        return kwargs.get("out", args[0] if args else found)
    on_gpu = bool(here) if target is None else target.type == "cuda"
    return tree_map(_pretended, found) if on_gpu else found


def _target(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.device | None:
    """Where the result is asked to be."""
    if name in ("cpu", "cuda"):
        return torch.device(name)
    places = [kwargs.get("device"), *(args[1:] if name == "to" else [])]
    places = [place.device if isinstance(place, torch.Tensor) else place for place in places]
    return next((torch.device(place) for place in places if isinstance(place, str | torch.device)), None)


def _waits(name: str, args: Sequence[Any], kwargs: dict[str, Any], target: torch.device | None) -> bool:
    if name == "copy_":
        between = isinstance(args[0], PretendedTensor) != isinstance(args[1], PretendedTensor)
        return between and not kwargs.get("non_blocking")
    if name in ("__getitem__", "__setitem__"):
        return any(leaf.dtype == torch.bool for leaf in tree_iter(args[1]) if isinstance(leaf, torch.Tensor))
    if name == "repeat_interleave":
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats", args[0])
        return isinstance(repeats, torch.Tensor) and kwargs.get("output_size") is None
    return name in _WAITS or (target is not None and target.type == "cpu")


def _sends(name: str, kwargs: dict[str, Any], target: torch.device | None) -> bool:
    """Whether values of the host's go to the GPU, and the host waits until they are there."""
    return name in _SENDS and target is not None and target.type == "cuda" and not kwargs.get("non_blocking")


def _pretended(leaf: Any) -> Any:
    return PretendedTensor(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _host(leaf: Any) -> Any:
    """The same on the host."""
    if isinstance(leaf, PretendedTensor):
        return leaf.host
    on_gpu = isinstance(leaf, str | torch.device) and str(leaf).startswith("cuda")
    return torch.device("cpu") if on_gpu else leaf


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Inside, device "cuda" is a pretended one; without gradients."""
    with torch.inference_mode(), PretendedGpu() as gpu:
        yield gpu
