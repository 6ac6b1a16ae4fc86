"""The sides of a comparison as processes of their own, each with its time and its peak memory.

>>> with Side("benchmarks.x:Ours") as ours, Side("benchmarks.x:Theirs") as theirs:
...     calls = ours.call("step"), theirs.call("step")
>>> row = with_memory(row, *calls)
"""

import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import REPOSITORY, Row, timed
from rollout.host_memory import host_environment

GIB = 2**30
STILL = 2**24
"""Bytes by which memory may change while page tables are walked."""
ON_NVIDIA = shutil.which("nvidia-smi") is not None and find_spec("pynvml") is not None  # which the GPU environment has


class MemoryWatch:
    """Peak of the summed memory of this process and its descendants, sampled while they work.

    >>> with MemoryWatch() as watch: step()
    >>> watch.peak_gib

    On a GPU it is device memory, else proportional memory: a page shared by k processes counts 1/k in each, so that
    the object store counts once. That walks page tables, which takes long; what is shared and which processes there
    are hardly changes, so between two such walks only private memory is read. Each way rests 50 times as long as it
    computes.
    """

    def __init__(self) -> None:
        self.peak_gib = 0.0
        self._shared: int | None = None
        self._pids: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def measure(self) -> float:
        """Memory now, in GiB; also counts for the peak."""
        root = psutil.Process()
        self._pids = [process.pid for process in (root, *root.children(recursive=True))]
        before = sum(map(_private_bytes, self._pids))
        now = _device_bytes(self._pids) if ON_NVIDIA else sum(map(_proportional_bytes, self._pids))
        after = sum(map(_private_bytes, self._pids))
        if self._shared is None or abs(after - before) <= STILL:  # else what is shared would be off by as much
            self._shared = now - after
        self.peak_gib = max(self.peak_gib, now / GIB)
        return now / GIB

    def _glance(self) -> None:
        now = (self._shared or 0) + sum(map(_private_bytes, self._pids))
        self.peak_gib = max(self.peak_gib, now / GIB)

    def _sample(self) -> None:
        rest = next_walk = 0.0
        while not self._stop.wait(rest):
            start = time.thread_time()
            walks = ON_NVIDIA or time.monotonic() >= next_walk
            if walks:
                self.measure()
            else:
                self._glance()
            rest = max(0.2 if ON_NVIDIA else 0.02, 50 * (time.thread_time() - start))
            if walks and not ON_NVIDIA:
                next_walk, rest = time.monotonic() + rest, 0.02


@dataclass(frozen=True)
class Call:
    """What one call in another process returned and cost."""

    result: Any
    seconds: float
    peak_gib: float
    """Peak memory of that side since it started, unwatched calls left out, in GiB: see MemoryWatch."""
    idle_gib: float
    """Memory before the first call: models and optimizer loaded, nothing computed."""


class Side:
    """One side of a comparison in a fresh process, so that its memory is its own; both sides may live at once.

    >>> with Side("benchmarks.end_to_end:Ours", "tiny-64") as ours:      # an object, made there by that class
    ...     call = ours.call("step", [1, 2, 3])                           # one of its methods, JSON in and out

    as_worker: start it as the project starts its actors, with their memory allocator.
    """

    def __init__(self, factory: str, *arguments: Any, as_worker: bool = False) -> None:
        command = [sys.executable, "-m", "benchmarks.sides", factory, json.dumps(arguments)]
        self.factory = factory
        environment = {**os.environ, **host_environment()} if as_worker and not ON_NVIDIA else None
        self._process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer("start")

    def call(self, method: str, *arguments: Any, watched: bool = True, at_least_s: float = 0.0) -> Call:
        """Raises RuntimeError when the process ended; its traceback is on the error stream.

        watched: its memory counts. To watch two dozen processes makes a step of theirs up to a fifth longer.
        at_least_s: a shorter call is made again until so much time has passed; its mean counts, and its last result.
        """
        assert self._process.stdin is not None
        print(json.dumps([method, arguments, watched, at_least_s]), file=self._process.stdin, flush=True)
        return Call(**self._answer(method))

    def _answer(self, what: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.factory}: the process ended in {what} with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()


class _Function:
    def __init__(self, function: str) -> None:
        self._function = _resolve(function)

    def call(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def in_fresh_process(function: str, *arguments: Any, as_worker: bool = False) -> Call:
    """Call "package.module:function"(*arguments) once in a Side; both survive JSON."""
    with Side("benchmarks.sides:_Function", function, as_worker=as_worker) as side:
        return side.call("call", *arguments)


def with_memory(row: Row, ours: Call, theirs: Call) -> Row:
    """The row with the peak memory of two calls."""
    return replace(row, ours_gib=ours.peak_gib, theirs_gib=theirs.peak_gib)


def _serve(factory: str, arguments: Sequence[Any]) -> None:
    """The other end of Side: answers on standard output; what libraries print there goes to the error stream."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with MemoryWatch() as watch:
        side = _resolve(factory)(*arguments)
        idle_gib = watch.measure()
    peak_gib = watch.peak_gib
    print(json.dumps({}), file=channel, flush=True)
    for line in sys.stdin:
        method, arguments, watched, at_least_s = json.loads(line)
        seconds: list[float] = []
        result: list[Any] = []
        with MemoryWatch() if watched else nullcontext() as watch:
            while sum(seconds) < at_least_s or not seconds:
                seconds.append(timed(lambda: result.append(getattr(side, method)(*arguments))))  # noqa: B023
        if watch is not None:
            watch.measure()
            peak_gib = max(peak_gib, watch.peak_gib)
        call = Call(result[-1], statistics.mean(seconds), peak_gib, idle_gib)
        print(json.dumps(asdict(call)), file=channel, flush=True)
    if hasattr(side, "close"):
        side.close()


def _resolve(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _proportional_bytes(pid: int) -> int:
    """Pss of a process; 0 when it ended meanwhile."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0


def _private_bytes(pid: int) -> int:
    """Resident memory of a process that no file and no shared segment backs; 0 when it ended meanwhile."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def _device_bytes(pids: Sequence[int]) -> int:
    """GPU memory that the driver attributes to the processes."""
    import pynvml

    pynvml.nvmlInit()
    devices = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    users = [user for device in devices for user in pynvml.nvmlDeviceGetComputeRunningProcesses(device)]
    return sum(user.usedGpuMemory or 0 for user in users if user.pid in pids)


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]))
