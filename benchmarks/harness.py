"""Figures: ratios of two sides that alternate in one run, with medians and spread, as tables and as JSON.

>>> row = compare("end-to-end", "tiny-64", ours=lambda: step(), theirs=lambda: published_step(), repeats=3)
>>> write_rows([row], "Whole steps")                 # prints the table; JSON to $OUT if it is set
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent


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


def write_rows(rows: Sequence[Row], title: str, extra: dict[str, Any] | None = None, remark: str = "") -> None:
    """Print a Markdown table and, if OUT is set, write {"rows", "machine", "markdown", ...extra} there as JSON."""
    text = markdown(rows) + (f"\n\n{remark}" if remark else "")
    write_section(title, text, {"rows": [asdict(row) for row in rows], **(extra or {})})


def write_section(title: str, text: str, content: dict[str, Any]) -> None:
    """Print Markdown under a heading and, if OUT is set, write it there as JSON with `content` and the machine."""
    section = f"## {title}\n\n{text}\n"
    print(f"\n{section}", flush=True)
    if out := os.environ.get("OUT"):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps({**content, "machine": machine(), "markdown": section}, indent=1) + "\n")


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
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
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
    """A file name for this machine's results, such as `intel-xeon-processor-amx-2-cores`."""
    description = machine()
    flags = "".join(description["matrix_flags"])
    instructions = next((name for name in ("amx", "avx512", "avx2") if name in flags), "")
    name = description.get("gpu") or f"{description['cpu']} {instructions} {description['cores']} cores"
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower().replace("(r)", "")).split()
    return "-".join(words)


def _cpuinfo(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(key):
            return line.partition(":")[2].strip()
    return "unknown"


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
