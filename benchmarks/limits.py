"""Each stage at 135M against its bound on this machine: matrix peak for rollout and learner, memory for the sync.

A stage's share is the arithmetic it needs (or the bytes it must move) divided by its seconds and by what the machine
does at best in the same precision with the same threads (benchmarks.peak). Where the rest goes stands in the profiles
beside the results.
"""

import statistics
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.arithmetic import Arithmetic, packed_work
from benchmarks.harness import REPOSITORY, machine_name, timed, write_section
from benchmarks.in_process import InProcess, counted_forwards
from benchmarks.peak import matrix_peak, memory_bandwidth
from benchmarks.shapes import ON_GPU, SHAPES, ShapeAbsentError, build
from benchmarks.sides import in_fresh_process
from rollout.groups import Candidates

RESULTS = REPOSITORY / "benchmarks/results"
REPEATS = 2


def measure(shape_name: str) -> list[dict[str, Any]]:
    """One entry per stage: {"shape", "stage", "seconds", "gflop" or "gigabytes", "share_of_bound"}."""
    workload = build(SHAPES[shape_name])
    prompts = workload.prompts(workload.step_examples(0))
    step = InProcess(workload.config, workload.model_path, workload.catalog)
    arithmetic, peak = Arithmetic(workload.model_path), matrix_peak(workload.shape.dtype)
    groups = step.rollout(prompts)
    warm = len(prompts) if ON_GPU else 1  # there kernels are compiled for a whole step
    step.learn(prompts[:warm], groups[:warm])

    rollout_s = [timed(lambda: step.rollout(prompts)) for _ in range(REPEATS)]
    with counted_forwards() as work:
        step.rollout(prompts)
    learned = [step.learn(prompts, groups) for _ in range(REPEATS)]
    sync_s = [step.sync() for _ in range(REPEATS)]
    save_profiles(shape_name, step, prompts, groups)

    rollout = arithmetic.forward(work)
    forward = arithmetic.forward(packed_work(step.packed(prompts, groups)))
    stages = [
        ("rollout", statistics.median(rollout_s), rollout),
        ("rollout, forward passes alone", work.forward_s + work.logits_s, rollout),
        ("reference", _median(learned, "seconds/reference"), forward),
        ("policy forward", _median(learned, "seconds/forward"), forward),
        ("policy backward", _median(learned, "seconds/backward"), 2 * forward),
        ("learner", _median(learned, "seconds/learn"), 4 * forward),
    ]
    entries = [
        {
            "shape": shape_name,
            "stage": stage,
            "seconds": seconds,
            "gflop": flop / 1e9,
            "share_of_bound": flop / seconds / peak,
        }
        for stage, seconds, flop in stages
    ]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in step.learner.policy.parameters())
    moved = 4 * weights  # read and write once into the buckets, and once more into the engine
    seconds = statistics.median(sync_s)
    share = moved / seconds / memory_bandwidth()
    entries.append(
        {"shape": shape_name, "stage": "sync", "seconds": seconds, "gigabytes": moved / 1e9, "share_of_bound": share}
    )
    return entries


def save_profiles(shape: str, step: InProcess, prompts: list[list[int]], groups: list[Candidates]) -> None:
    """Where the time of a rollout, and of a learner step on its first group, goes: as text beside the results."""
    RESULTS.mkdir(exist_ok=True)
    calls = {"rollout": lambda: step.rollout(prompts), "learn": lambda: step.learn(prompts[:1], groups[:1])}
    for stage, call in calls.items():
        activities, device = [ProfilerActivity.CPU], "cpu"
        if torch.cuda.is_available():
            activities, device = [*activities, ProfilerActivity.CUDA], "device"
        with profile(activities=activities) as profiler:
            timed(call)
        sort_by = f"self_{device}_time_total"
        table = profiler.key_averages().table(sort_by=sort_by, row_limit=25, max_name_column_width=60)
        (RESULTS / f"profile-{machine_name()}-{shape}-{stage}.txt").write_text(table + "\n")


def markdown(entries: list[dict[str, Any]]) -> str:
    lines = ["| shape | stage | time | work | share of the bound |", "|---|---|---|---|---|"]
    for entry in entries:
        work = f"{entry['gflop']:.0f} GFLOP" if "gflop" in entry else f"{entry['gigabytes']:.2f} GB"
        lines.append(
            f"| {entry['shape']} | {entry['stage']} | {entry['seconds']:.3g} s | {work} "
            f"| {entry['share_of_bound']:.0%} |"
        )
    return "\n".join(lines)


def _median(metrics: list[dict[str, float]], name: str) -> float:
    return statistics.median(entry[name] for entry in metrics)


def main(shape: str = "industrial-135m-fp32") -> None:
    try:
        build(SHAPES[shape])
    except ShapeAbsentError as absent:
        print(f"{shape}: skipped, {absent}")
        return
    entries = in_fresh_process("benchmarks.limits:measure", shape, as_worker=True).result
    write_section(f"Limits, {shape}", markdown(entries), {"limits": entries})


if __name__ == "__main__":
    main(*sys.argv[1:])
