"""Random numbers that are functions of their counters: the same on every device and in every batch."""

from collections.abc import Sequence

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685


def seed_tensor(seeds: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 [n] of integers of any size, modulo 2**64."""
    wrapped = [(int(seed) + 2**63) % 2**64 - 2**63 for seed in seeds]
    return torch.tensor(wrapped, dtype=torch.int64).to(device, non_blocking=True)


def uniform(seed: torch.Tensor, *counters: torch.Tensor) -> torch.Tensor:
    """float64 in (0, 1) for each (seed, counters), int64 tensors that broadcast (splitmix64 over a chain of them)."""
    state = _mix(seed + _GOLDEN)
    for counter in counters:
        state = _mix((state ^ counter) + _GOLDEN)
    return (_shifted(state, 12).double() + 0.5) * 2.0**-52  # one bit more would round up to 1


def gumbel(seed: torch.Tensor, *counters: torch.Tensor) -> torch.Tensor:
    """float64, standard Gumbel distributed, for each (seed, counters)."""
    return -(-uniform(seed, *counters).log()).log()


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
