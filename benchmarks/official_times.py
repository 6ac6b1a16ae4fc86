"""The published code's own wall times, of another day and machine, beside ours on the same workload.

The golden set (GOLDEN=, else the folder beside the repository) records one step of 4 groups of 16 on SmolLM2-135M with
prompts of known lengths. Ours takes Industrial prompts of those lengths on this machine now: no ratio to rely on.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import REPOSITORY, write_section
from benchmarks.shapes import SHAPES, ShapeAbsentError, build
from benchmarks.sides import Side

SHAPE_OF_DTYPE = {"torch.float32": "industrial-135m-fp32", "torch.bfloat16": "industrial-135m-bf16"}


def measure() -> list[dict[str, Any]]:
    """One entry per recorded step at 135M: {"shape", "official_s", "ours_s", "official_gib", "cpu"}."""
    path = Path(os.environ.get("GOLDEN") or REPOSITORY.parent / "shared/golden") / "timings.json"
    if not path.is_file():
        raise ShapeAbsentError(f"{path} does not exist; name a golden set with GOLDEN=")
    timings = json.loads(path.read_text())
    entries = []
    for run in timings["runs"]:
        if run["model"] != "smol":
            continue
        shape = SHAPE_OF_DTYPE[run["param_dtype"]]
        example_ids = examples_of_lengths(shape, run["prompt_tokens"][0])
        with Side("benchmarks.end_to_end:Ours", shape) as ours:
            ours.call("step", example_ids[:1], watched=False)
            seconds = ours.call("step", example_ids, watched=False).seconds
        entries.append(
            {
                "shape": shape,
                "official_s": run["training_step_total_s"][0],
                "official_gib": run["peak_rss_gb"],
                "ours_s": seconds,
                "cpu": timings["cpu"],
            }
        )
    return entries


def examples_of_lengths(shape: str, lengths: list[int]) -> list[int]:
    """Training examples whose prompts are nearest to the lengths, all different."""
    available = build(SHAPES[shape]).catalog.examples("train").prompt_lengths
    chosen: list[int] = []
    for length in lengths:
        order = np.argsort(np.abs(available - length), kind="stable")
        chosen.append(next(int(example_id) for example_id in order if example_id not in chosen))
    return chosen


def markdown(entries: list[dict[str, Any]]) -> str:
    lines = ["| shape | published code, another day | ours, today |", "|---|---|---|"]
    for entry in entries:
        lines.append(f"| {entry['shape']} | {entry['official_s']:.0f} s ({entry['cpu']}) | {entry['ours_s']:.1f} s |")
    return "\n".join(lines)


def main() -> None:
    try:
        entries = measure()
    except ShapeAbsentError as absent:
        print(f"official times: skipped, {absent}")
        return
    write_section("The published code's own times, of another day", markdown(entries), {"official_times": entries})


if __name__ == "__main__":
    main()
