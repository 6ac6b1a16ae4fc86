"""Seconds from what `make launch` runs to the first training step, with everything on disk already."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import REPOSITORY, write_section

WITHOUT_SFT = ("learner.sft.epochs=0", "train.eval_examples=1", "train.checkpoint_every=1000000")
"""What lies between start-up and the first step of a real run is SFT and evaluation; they are no start-up."""


def measure() -> float:
    """Seconds until the first step ended, less that step; the catalogue and the model are built before."""
    _launch()
    return _launch()


def _launch() -> float:
    """A run of one step; returns when that step began, in seconds after the command was given."""
    with tempfile.TemporaryDirectory() as runs:
        overrides = [*WITHOUT_SFT, f"runs={runs}"]
        command = [sys.executable, "-m", "launch.cli", "train", "--name", "start-up", "--steps", "1", *overrides]
        environment = {**os.environ, "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
        log = Path(runs) / "start-up/metrics.jsonl"
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL) as process:
            while (step_s := _first_step_seconds(log)) is None:
                if process.poll() is not None:
                    raise RuntimeError(f"`{' '.join(command)}` ended without a step; its error stream says why")
                time.sleep(0.05)
            reached = time.perf_counter() - start - step_s
            process.wait()
    return reached


def _first_step_seconds(log: Path) -> float | None:
    """What the first step took, once it is logged."""
    if not log.is_file():
        return None
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if "timing_s/step" in entry:
            return float(entry["timing_s/step"])
    return None


def main() -> None:
    seconds = measure()
    text = f"{seconds:.1f} s from `make launch` to the first step, with the catalogue and the model on disk."
    write_section("Start-up", text, {"start_up_s": seconds})


if __name__ == "__main__":
    main()
