"""Weights in transit: buckets of named tensors, and the checksum by which both ends agree on what is loaded."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

import numpy as np
import torch

from rollout.arrays import as_tensor

CHECKSUM_BITS = 63
_ON_CPU, _ON_CUDA = 1 << 16, 1 << 24
# Elements that are summed at once, two copies of them as 64-bit integers.
_MIX = 0x1E3779B97F4A7C15
_BITS_OF_ITEM_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightsError(RuntimeError):
    """Weights that arrived are not those that were sent, or not those that the engine needs."""


@dataclass(frozen=True)
class WeightBucket:
    """Named tensors in one flat array, so that a bucket crosses processes as one buffer.

    >>> bucket = WeightBucket.pack([("model.norm.weight", tensor), ...])
    >>> dict(bucket.tensors())                        # views into bucket.data, nothing is copied
    """

    names: Sequence[str]
    """Hugging Face parameter names."""
    dtypes: Sequence[str]
    """As torch calls them: "float32", "bfloat16"."""
    shapes: Sequence[tuple[int, ...]]
    data: np.ndarray
    """uint8 [total bytes]: the tensors one after the other, row-major."""

    @classmethod
    def pack(cls, tensors: Iterable[tuple[str, torch.Tensor]]) -> "WeightBucket":
        """Copy tensors (any device) into one bucket; those of a GPU into pinned memory, with one wait for all."""
        named = [(name, tensor.detach()) for name, tensor in tensors]
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in named)
        of_gpu = any(tensor.is_cuda for _, tensor in named)
        data = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy() if of_gpu else np.empty(size, np.uint8)
        start = 0
        for _, tensor in named:
            end = start + tensor.numel() * tensor.element_size()
            destination = torch.from_numpy(data[start:end]).view(tensor.dtype).view(tensor.shape)
            destination.copy_(tensor, non_blocking=of_gpu)
            start = end
        if of_gpu:
            torch.cuda.current_stream().synchronize()
        return cls(
            names=[name for name, _ in named],
            dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in named],
            shapes=[tuple(tensor.shape) for _, tensor in named],
            data=data,
        )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, view into the bucket) in order. Raises WeightsError where the data is shorter than the shapes say."""
        flat = as_tensor(self.data)
        start = 0
        for name, dtype_name, shape in zip(self.names, self.dtypes, self.shapes, strict=True):
            dtype = getattr(torch, dtype_name)
            end = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            if end > len(self.data):
                raise WeightsError(f"weight bucket: {name} {tuple(shape)} ends at byte {end} of {len(self.data)}")
            yield name, flat[start:end].view(dtype).view(tuple(shape))
            start = end


def checksum(tensors: Iterable[tuple[str, torch.Tensor | np.ndarray]]) -> int:
    """Checksum of named tensors, in [0, 2**63).

    Tensors carry their Hugging Face names, a tied one once. The order of tensors does not matter; every other change
    does: any single changed element (of up to 4 bytes) changes it for certain, and exchanged elements, rows or tensors
    almost surely.
    """
    return combine(tensor_checksum(name, tensor) for name, tensor in tensors)


def combine(checksums: Iterable[int]) -> int:
    """The checksum of all tensors (or parts of tensors) from those of each."""
    return sum(checksums) % (1 << CHECKSUM_BITS)


def tensor_checksum(
    name: str, tensor: torch.Tensor | np.ndarray, *, row_offset: int = 0, column_offset: int = 0
) -> int:
    """Checksum of one tensor, or of the part of it that starts at (row_offset, column_offset).

    With bits x[r, c] of each element as an integer, and odd pseudo-random weights of the name, the row and the
    column: key(name) * sum(row[r] * column[c] * x[r, c]) mod 2**63. It is a sum over elements, so parts that different
    devices hold, or that one fused matrix holds, add up to the checksum of the whole.
    """
    if isinstance(tensor, np.ndarray):
        tensor = as_tensor(tensor)
    if not tensor.numel():
        return 0
    bits = tensor.detach().contiguous().view(_BITS_OF_ITEM_SIZE[tensor.element_size()])
    bits = bits.reshape(len(bits), -1) if bits.dim() else bits.reshape(1, 1)
    row = _odd_weights(len(bits) + row_offset, 1)[row_offset:].to(bits.device)
    column = _odd_weights(bits.shape[1] + column_offset, 2)[column_offset:].to(bits.device)
    step = max(1, (_ON_CUDA if bits.is_cuda else _ON_CPU) // max(1, bits.shape[1]))
    sums = [(bits[i : i + step] * column).sum(1) for i in range(0, len(bits), step)]
    return int((torch.cat(sums) * row).sum()) * _key(name) % (1 << CHECKSUM_BITS)


def elements_checksum(tensor: torch.Tensor) -> int:
    """Checksum of a tensor's elements in any order and shape, in [0, 2**63); zeros are not counted.

    It notices other elements, not where they lie: for tensors of which two sides keep the elements in other places.
    """
    bits = tensor.detach().flatten().view(_BITS_OF_ITEM_SIZE[tensor.element_size()])
    total = 0
    for part in bits.split(_ON_CUDA if bits.is_cuda else _ON_CPU):
        mixed = part.to(torch.int64, copy=True).mul_(_MIX)  # in place: two such copies exist at once, not three
        total += int(mixed.bitwise_xor_(mixed >> 29).mul_(_MIX).sum())
    return total % (1 << CHECKSUM_BITS)


@cache
def _key(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") | 1


@cache
def _odd_weights(count: int, seed: int) -> torch.Tensor:
    """int64 [count]: odd, pseudo-random, the same on every machine (splitmix64)."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64(1 + (seed << 40))) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) | np.uint64(1)).view(np.int64))
