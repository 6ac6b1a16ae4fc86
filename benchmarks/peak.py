"""What this machine can do at best: matrix peak in each precision and memory bandwidth, measured with torch."""

import time
from collections.abc import Callable
from functools import cache

import torch

from benchmarks.harness import threads
from learner.products import linear

SECONDS = 1.0


@cache
def matrix_peak(dtype: str) -> float:
    """FLOP/s of the best of repeated products of square matrices, with the fastest library of torch."""
    torch.set_num_threads(threads())
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)  # a GPU is not filled by less
    left, weight = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    with torch.inference_mode():
        return 2 * size**3 / _best(lambda: linear(left, weight))


@cache
def memory_bandwidth(mebibytes: int = 512) -> float:
    """Bytes/s of a copy much larger than the caches; reads and writes both counted."""
    torch.set_num_threads(threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _best(lambda: target.copy_(source))


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest call within SECONDS, after one to warm up."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    call()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    for dtype in ("float32", "bfloat16"):
        print(f"{dtype}: {matrix_peak(dtype) / 1e9:.0f} GFLOP/s with {threads()} threads")
    print(f"memory: {memory_bandwidth() / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
