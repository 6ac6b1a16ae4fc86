"""Rollouts against Hugging Face `generate` and against one-token requests; what they feed, and how they grow.

Both sides of a ratio alternate in one process, with the same weights, precision and threads, and must return the same
candidates, or there is no figure.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.growth import random_trie
from benchmarks.harness import Row, Side, compare, markdown, threads, timed, with_memory, write_section
from benchmarks.in_process import counted_forwards
from benchmarks.one_token_requests import OneTokenRequests
from benchmarks.published_way import PublishedTrainer
from benchmarks.rollout_workloads import EOS, RolloutWorkload, industrial, middle, tiny
from benchmarks.shapes import ShapeAbsentError
from catalog.trie import Trie
from rollout.config import RolloutConfig
from rollout.groups import Candidates
from rollout.kv_blocks import BeamBlocks
from rollout.worker_engine import WorkerEngine

GROUP_SIZES = (4, 8, 16, 32, 64, 128)
CATALOGUES = (1_000, 10_000, 100_000, 1_000_000)
SHAPES: dict[str, Callable[[Path], RolloutWorkload]] = {
    "tiny-64": tiny,
    "135m-8": middle,
    "industrial-8": lambda folder: industrial(),
}


def settings(workload: RolloutWorkload) -> RolloutConfig:
    return RolloutConfig(kv_cache_gib=workload.kv_cache_gib, max_batched_tokens=4096)


class Ours:
    """The worker engine on a workload."""

    def __init__(self, workload: RolloutWorkload) -> None:
        self._prompts = workload.prompts
        self.engine = WorkerEngine(workload.model_path, workload.trie_path, settings(workload))

    def run(self, group_size: int = 16) -> list[Candidates]:
        none = [0] * len(self._prompts)
        return self.engine.generate(self._prompts, none, none, group_size=group_size)


class HuggingFace:
    """The published way on a workload."""

    def __init__(self, workload: RolloutWorkload) -> None:
        self._workload = workload
        self._trainer = PublishedTrainer(str(workload.model_path), Trie.load(workload.trie_path))

    def run(self) -> list[list[list[int]]]:
        """Tokens of every candidate of every group."""
        prompts, at_once = self._workload.prompts, self._workload.generate_groups
        rows: list[list[int]] = []
        for start in range(0, len(prompts), at_once):
            rows += self._trainer.generate(prompts[start : start + at_once]).tokens()
        return [rows[i : i + 16] for i in range(0, len(rows), 16)]


def against_hugging_face(workload: RolloutWorkload, ours: Ours) -> Row:
    theirs = HuggingFace(workload)
    answers: dict[str, list[list[list[int]]]] = {}

    def run_ours() -> None:
        answers["ours"] = _tokens(ours.run())

    def run_theirs() -> None:
        answers["theirs"] = theirs.run()

    ours.run()
    warmup = int(workload.repeats > 1)
    row = compare("hugging-face", workload.name, run_ours, run_theirs, repeats=workload.repeats, warmup=warmup)
    assert answers["ours"] == answers["theirs"], f"{workload.name}: candidates differ from Hugging Face"
    return row


def against_one_token_requests(workload: RolloutWorkload, ours: Ours) -> Row:
    theirs = OneTokenRequests(workload.model_path, workload.trie_path, settings(workload))
    found = theirs.generate(workload.prompts)
    assert _tokens(ours.run()) == _tokens(found), f"{workload.name}: candidates differ from one-token requests"
    row = compare("one-token-requests", workload.name, ours.run, lambda: theirs.generate(workload.prompts), repeats=3)
    theirs.shutdown()
    return row


def fed_tokens(workload: RolloutWorkload, ours: Ours) -> dict[str, Any]:
    """Tokens through the model against the least possible, and the share of time that the model's forward takes."""
    with counted_forwards() as work, _counted_visits() as visits:
        seconds = timed(ours.run)
    visited = sum(visits)
    least = _distinct_prefixes(workload.prompts) + visited
    naive = sum(map(len, workload.prompts)) + visited
    groups = len(workload.prompts)
    return {
        "shape": workload.name,
        "tokens_per_group": work.tokens / groups,
        "least_per_group": least / groups,
        "without_sharing_prompts": naive / groups,
        "forward_share": (work.forward_s + work.logits_s) / seconds,
        "tokens_per_second": work.tokens / seconds,
        "groups_per_second": groups / seconds,
    }


@contextmanager
def _counted_visits() -> Iterator[list[int]]:
    """Trie nodes whose tokens a search feeds, each once per group: what it makes room for after the prompts."""
    visits: list[int] = []
    extend = BeamBlocks.extend

    def counting(self: BeamBlocks, slots: np.ndarray, counts: np.ndarray) -> None:
        visits.append(int(counts.sum()))
        extend(self, slots, counts)

    BeamBlocks.extend = counting  # type: ignore[method-assign]
    try:
        yield visits
    finally:
        BeamBlocks.extend = extend  # type: ignore[method-assign]


def _distinct_prefixes(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens of the prompts when every common beginning counts once."""
    total = 0
    before: list[int] = []
    for prompt in sorted(map(list, prompts)):
        common = next((i for i, (a, b) in enumerate(zip(prompt, before, strict=False)) if a != b), None)
        total += len(prompt) - (min(len(prompt), len(before)) if common is None else common)
        before = prompt
    return total


def by_group_size(workload: RolloutWorkload, ours: Ours) -> list[dict[str, float]]:
    """Groups per second for every G."""
    points = []
    for size in GROUP_SIZES:
        ours.run(size)
        seconds = min(timed(partial(ours.run, size)) for _ in range(3))
        points.append({"group_size": size, "groups_per_second": len(workload.prompts) / seconds})
    return points


def by_catalogue(folder: Path) -> list[dict[str, float]]:
    """Seconds per forward pass, rows of it alike, for every size of the catalogue."""
    points = []
    base = tiny(folder)
    for titles in CATALOGUES:
        path = folder / f"catalogue-{titles}.arrow"
        random_trie(np.random.default_rng(0), titles, 14, 1536, EOS).save(path)
        ours = Ours(replace(base, trie_path=path))
        with counted_forwards() as work:
            ours.run()
        seconds = min(timed(ours.run) for _ in range(5))
        points.append({"titles": titles, "seconds": seconds, "microseconds_per_token": 1e6 * seconds / work.tokens})
        ours.engine.shutdown()
    return points


class Peak:
    """One side of a shape in a process of its own, for its peak memory."""

    def __init__(self, shape: str, side: str, folder: str) -> None:
        torch.set_num_threads(threads())
        workload = SHAPES[shape](Path(folder))
        self._side: Ours | HuggingFace = Ours(workload) if side == "ours" else HuggingFace(workload)

    def run(self) -> None:
        self._side.run()


def with_peak_memory(row: Row, folder: Path) -> Row:
    """The row with the peak memory of one run of each side."""
    calls = []
    for side in ("ours", "theirs"):
        with Side("benchmarks.rollout:Peak", row.shape, side, str(folder)) as process:
            calls.append(process.call("run"))
    return with_memory(row, *calls)


def measure(shape: str, folder: Path) -> tuple[list[Row], dict[str, Any], list[dict[str, float]]]:
    """Rows, fed tokens and, for the tiny shape, groups per second by G."""
    workload = SHAPES[shape](folder)
    ours = Ours(workload)
    rows = [against_hugging_face(workload, ours)]
    sizes = []
    if shape == "tiny-64":
        rows.append(against_one_token_requests(workload, ours))
        sizes = by_group_size(workload, ours)
    fed = fed_tokens(workload, ours)
    ours.engine.shutdown()
    return [with_peak_memory(rows[0], folder), *rows[1:]], fed, sizes


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Entries of equal keys as a Markdown table."""
    names = list(entries[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    for entry in entries:
        values = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in entry.values())
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def main(shapes: Sequence[str]) -> None:
    torch.set_num_threads(threads())
    rows: list[Row] = []
    content: dict[str, Any] = {"fed": [], "group_sizes": [], "catalogues": []}
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            try:
                measured, fed, sizes = measure(shape, Path(folder))
            except ShapeAbsentError as absent:
                print(f"{shape}: skipped, {absent}", flush=True)
                continue
            rows += measured
            content["fed"].append(fed)
            content["group_sizes"] += sizes
            write(rows, content)
        if "tiny-64" in shapes:
            content["catalogues"] = by_catalogue(Path(folder))
            write(rows, content)


def write(rows: Sequence[Row], content: dict[str, Any]) -> None:
    """All that is known so far."""
    tables = [markdown(rows), *(table(entries) for entries in content.values() if entries)]
    write_section("Rollouts", "\n\n".join(tables), {"rows": [vars(row) for row in rows], **content})


def _tokens(groups: Sequence[Candidates]) -> list[list[list[int]]]:
    return [[tokens.tolist() for tokens in group.tokens] for group in groups]


if __name__ == "__main__":
    main(sys.argv[1:] or tuple(SHAPES))
