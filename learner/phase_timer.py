"""How long each phase of a step takes, on the device that computes it."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class PhaseTimer:
    """Seconds of phases, which may be nested and repeated. A GPU marks them as it passes; nothing waits for it.

    >>> timer = PhaseTimer(device)
    >>> with timer("learn"):
    ...     with timer("forward"): ...
    >>> timer.seconds()
    {"forward": 0.2, "learn": 0.3}
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._passed: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self._passed.append((phase, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """The sum of each phase's times; waits for the GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for phase, start, end in self._passed:
            seconds[phase] += start.elapsed_time(end) / 1000 if self._on_gpu else end - start
        return dict(seconds)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        return now
