"""How every ratio is measured: both sides alternate in one run, medians and spread, peak memory in fresh processes.

>>> row = compare("end-to-end", "tiny-64", ours=lambda: step(), theirs=lambda: published_step(), repeats=3)
>>> row = replace(row, **memory_columns(peak_memory("benchmarks.x:ours", shape), peak_memory("benchmarks.x:theirs")))
>>> write_rows([row], "Whole steps")                 # prints the table; JSON to $OUT if it is set
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One comparison. Times are medians in seconds; ratio is theirs / ours, of the medians."""

    case: str
    shape: str
    ours_s: float
    theirs_s: float
    ratio: float
    ratio_low: float
    """Smallest ratio of a neighbouring pair of measurements, and the largest: the spread."""
    ratio_high: float
    repeats: int
    ours_gib: float | None = None
    """Peak resident memory of all processes of that side, in GiB, where it was measured."""
    theirs_gib: float | None = None
    note: str = ""


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call; on a GPU until its queue is empty."""
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def compare(
    case: str,
    shape: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    repeats: int = 3,
    warmup: int = 1,
    note: str = "",
) -> Row:
    """Alternate ours and theirs, so that a busy machine slows both; the first `warmup` pairs are not counted."""
    pairs = [(timed(ours), timed(theirs)) for _ in range(warmup + repeats)][warmup:]
    return row_of_pairs(case, shape, pairs, note=note)


def row_of_pairs(case: str, shape: str, pairs: Sequence[tuple[float, float]], *, note: str = "") -> Row:
    """pairs: (ours, theirs) seconds of neighbouring measurements."""
    ours_s, theirs_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [theirs / ours for ours, theirs in pairs]
    return Row(case, shape, ours_s, theirs_s, theirs_s / ours_s, min(ratios), max(ratios), len(pairs), note=note)


def write_rows(rows: Sequence[Row], title: str, extra: dict[str, Any] | None = None) -> None:
    """Print a Markdown table and, if OUT is set, write {"rows", "machine", ...extra} there as JSON."""
    print(f"\n## {title}\n\n{markdown(rows)}\n", flush=True)
    if out := os.environ.get("OUT"):
        content = {"rows": [asdict(row) for row in rows], "machine": machine(), **(extra or {})}
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(content, indent=1) + "\n")


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; a memory column shows GiB of ours / theirs."""
    lines = [
        "| case | shape | ours | theirs | ratio | spread | repeats | memory ours / theirs | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = "" if row.ours_gib is None else f"{row.ours_gib:.2f} / {row.theirs_gib or 0:.2f} GiB"
        lines.append(
            f"| {row.case} | {row.shape} | {row.ours_s:.3g} s | {row.theirs_s:.3g} s | **{row.ratio:.1f}x** "
            f"| {row.ratio_low:.1f}-{row.ratio_high:.1f} | {row.repeats} | {memory} | {row.note} |"
        )
    return "\n".join(lines)


def threads() -> int:
    """CPU threads that both sides may use: OMP_NUM_THREADS, else all cores."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    description: dict[str, Any] = {
        "cpu": _cpuinfo("model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "matrix_flags": sorted(
            flag for flag in _cpuinfo("flags").split() if flag.startswith(("amx", "avx2", "avx512f", "avx512_bf16"))
        ),
        "threads": threads(),
        "torch": torch.__version__,
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
    return description


def machine_name() -> str:
    """A file name for this machine's results, such as `intel-xeon-processor-2-cores`."""
    description = machine()
    name = description.get("gpu") or f"{description['cpu']} {description['cores']} cores"
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower().replace("(r)", "")).split()
    return "-".join(words)


class MemoryWatch:
    """Peak of the summed proportional memory of this process and its descendants, sampled every 50 ms.

    >>> with MemoryWatch() as watch: step()
    >>> watch.peak_gib

    Proportional means that a page shared by k processes counts 1/k in each: the object store counts once.
    """

    def __init__(self) -> None:
        self.peak_gib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        root = psutil.Process()
        while True:
            processes = [root, *root.children(recursive=True)]
            self.peak_gib = max(self.peak_gib, sum(_proportional_bytes(process.pid) for process in processes) / GIB)
            if self._stop.wait(0.05):
                return


def peak_memory(function: str, *arguments: Any) -> dict[str, Any]:
    """Call "package.module:function"(*arguments) in a fresh process: {"result", "peak_gib", "gpu_gib"}.

    arguments and the result must survive JSON. Raises CalledProcessError when the call fails.
    """
    command = [sys.executable, "-m", "benchmarks.harness", function, json.dumps(arguments)]
    output = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def memory_columns(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Columns for dataclasses.replace(row, ...) out of two results of peak_memory."""
    key = "gpu_gib" if ours["gpu_gib"] else "peak_gib"
    return {"ours_gib": ours[key], "theirs_gib": theirs[key]}


def _main() -> None:
    parser = argparse.ArgumentParser(description="call one function and print its result and peak memory as JSON")
    parser.add_argument("function")
    parser.add_argument("arguments", type=json.loads)
    options = parser.parse_args()
    module, _, name = options.function.partition(":")
    with MemoryWatch() as watch:
        result = getattr(importlib.import_module(module), name)(*options.arguments)
    import torch

    gpu_gib = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
    print(json.dumps({"result": result, "peak_gib": watch.peak_gib, "gpu_gib": gpu_gib}), flush=True)


def _proportional_bytes(pid: int) -> int:
    """Pss of a process; 0 when it ended meanwhile."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0


def _cpuinfo(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(key):
            return line.partition(":")[2].strip()
    return "unknown"


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    _main()
