"""Groups per second of the rollout fleet as workers go from 1 to 2 and batches grow, and of whole steps."""

import sys
from typing import Any

from benchmarks.harness import write_section
from benchmarks.shapes import ON_GPU
from benchmarks.sides import Side

SHAPE = "tiny-64"
WORKERS = (1,) if ON_GPU else (1, 2)
"""Two workers would need three GPUs, beside the learner's."""
BATCHES = (1, 4, 16, 64)
REPEATS = 2


def measure(shape: str = SHAPE) -> list[dict[str, Any]]:
    """One entry per number of workers and groups per batch: {"workers", "batch", "groups_per_s"}; the best repeat."""
    entries = []
    for workers in WORKERS:
        with Side("benchmarks.end_to_end:Ours", shape, f"rollout.workers={workers}") as ours:
            for batch in BATCHES:
                groups = batch * workers
                _, *calls = [ours.call("roll_out", groups, watched=False) for _ in range(REPEATS + 1)]
                best = min(call.seconds for call in calls)
                entries.append({"workers": workers, "batch": batch, "groups_per_s": groups / best})
    return entries


def markdown(entries: list[dict[str, Any]]) -> str:
    header = " | ".join(f"{batch} groups per batch" for batch in BATCHES)
    lines = [f"| workers | {header} |", "|---" * (len(BATCHES) + 1) + "|"]
    for workers in WORKERS:
        rates = [entry["groups_per_s"] for entry in entries if entry["workers"] == workers]
        lines.append(f"| {workers} | " + " | ".join(f"{rate:.1f}/s" for rate in rates) + " |")
    return "\n".join(lines)


def main(shape: str = SHAPE) -> None:
    entries = measure(shape)
    write_section(f"Groups per second, {shape}", markdown(entries), {"scaling": entries})


if __name__ == "__main__":
    main(*sys.argv[1:])
