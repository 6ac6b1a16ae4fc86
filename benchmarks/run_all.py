"""`make bench`: every benchmark, one after the other, and one file of results for this machine.

`python -m benchmarks.run_all learner limits` measures these two anew in the file that is there.
Each runs as a process of its own; one that fails or exceeds its share of the time is named in the results instead of
ending the rest. Heavy cases come with fewer repeats, which their tables say.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import REPOSITORY, machine, machine_name
from benchmarks.shapes import ON_GPU, measurable

RESULTS = REPOSITORY / "benchmarks/results"
SECTIONS = {
    "end_to_end": 1500,
    "rollout": 660,
    "learner": 480,
    "rewards": 120,
    "limits": 360,
    "growth": 420,
    "scaling": 180,
    "start_up": 180,
    "official_times": 300,
}
"""Module of benchmarks: the longest that it may take, in seconds."""
SHAPES: dict[str, tuple[str, ...]] = (
    {} if ON_GPU else {"rollout": ("tiny-64", "industrial-8"), "learner": measurable(["135m-fp32", "135m-bf16"])[0]}
)
"""What fits into 40 minutes on 2 cores; each module measures more when it is run alone."""


def run(module: str, limit_s: float, out: Path) -> dict[str, Any]:
    """What the module wrote, and its wall time; {"markdown": why not} when it failed."""
    start = time.perf_counter()
    command, environment = (
        [sys.executable, "-m", f"benchmarks.{module}", *SHAPES.get(module, ())],
        {**os.environ, "OUT": str(out)},
    )
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True) as process:
        try:
            status = process.wait(limit_s)
            problem = f"ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            problem = f"was ended after its limit of {limit_s} s"
    written = json.loads(out.read_text()) if out.is_file() else {"markdown": f"## {module}\n"}
    if not out.is_file():
        problem = problem or "was skipped: its model or its data is not here"
    if problem:
        written["markdown"] += f"\nThis benchmark {problem}.\n"
    if module in SHAPES:
        shapes = ", ".join(SHAPES[module])
        written["markdown"] += f"\nOnly {shapes}; `.venv/bin/python -m benchmarks.{module}` measures more.\n"
    return written | {"seconds": time.perf_counter() - start}


def main(modules: list[str]) -> None:
    """Measure some modules anew, or all; what the file of results says of others stays as it is."""
    kept = RESULTS / f"{machine_name()}.json"
    before = json.loads(kept.read_text())["sections"] if modules and kept.is_file() else {}
    sections: dict[str, dict[str, Any]] = {module: before[module] for module in SECTIONS if module in before}
    modules = modules or list(SECTIONS)
    with tempfile.TemporaryDirectory() as folder:
        for module in modules:
            sections[module] = run(module, SECTIONS[module], Path(folder) / f"{module}.json")
            write(sections)
    print(f"{RESULTS / machine_name()}.md\n{sum(sections[module]['seconds'] for module in modules) / 60:.1f} minutes")


def write(sections: dict[str, dict[str, Any]]) -> None:
    """The results of all sections so far: JSON and Markdown, and JSON to $OUT if it is set."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = [row for section in sections.values() for row in section.get("rows", [])]
    text = json.dumps({"machine": machine(), "rows": rows, "sections": sections}, indent=1) + "\n"
    for path in (RESULTS / f"{machine_name()}.json", *([Path(os.environ["OUT"])] if os.environ.get("OUT") else [])):
        path.write_text(text)
    description = "\n".join(f"- {key}: {value}" for key, value in machine().items())
    tables = "\n".join(section["markdown"] for section in sections.values())
    times = ", ".join(f"{module} {section['seconds']:.0f} s" for module, section in sections.items())
    (RESULTS / f"{machine_name()}.md").write_text(f"# Benchmarks\n\n{description}\n- took: {times}\n\n{tables}")


if __name__ == "__main__":
    main(sys.argv[1:])
