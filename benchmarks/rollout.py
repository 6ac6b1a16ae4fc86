"""Rollouts against Hugging Face `generate`, one-token requests and forced chains that are walked token by token; what
they feed, and how they grow.

Both sides of a ratio alternate in one run, each in a process of its own, with the same weights, precision and threads,
and must return the same candidates, or there is no figure.
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
from benchmarks.harness import Row, markdown, row_of_pairs, threads, timed, write_section
from benchmarks.in_process import counted_forwards
from benchmarks.one_token_requests import OneTokenRequests
from benchmarks.published_way import PublishedTrainer
from benchmarks.rollout_workloads import EOS, RolloutWorkload, half_a_billion, industrial, many, middle, tiny
from benchmarks.shapes import ON_GPU, ShapeAbsentError
from benchmarks.sides import Side, with_memory
from catalog.trie import Trie
from rollout.config import ForcedChains, RolloutConfig
from rollout.groups import Candidates
from rollout.kv_blocks import BeamBlocks
from rollout.worker_engine import WorkerEngine

GROUP_SIZES = (4, 8, 16, 32, 64, 128)
CATALOGUES = (1_000, 10_000, 100_000, 1_000_000)
SHAPES: dict[str, Callable[[Path], RolloutWorkload]] = {
    "tiny-64": tiny,
    "135m-8": middle,
    "industrial-8": lambda folder: industrial(),
    **({"135m-64-bf16": many, "0.5b-64-bf16": half_a_billion} if ON_GPU else {}),
}


BY_CATALOGUE = "catalogues"
"""Named like a shape: the tiny model on every size of CATALOGUES."""


STEADY_S = 0.5
"""Each side of a pair rolls out for at least so long: after the other one's turn the caches are cold."""


def settings(workload: RolloutWorkload) -> RolloutConfig:
    return RolloutConfig(
        kv_cache_gib=workload.kv_cache_gib, dtype=workload.dtype, max_batched_tokens=workload.max_batched_tokens
    )


class Ours:
    """The worker engine on a shape; lives in a process of its own."""

    def __init__(self, shape: str, folder: str, forced_chains: ForcedChains = "at_once") -> None:
        self.workload = SHAPES[shape](Path(folder))
        config = replace(settings(self.workload), forced_chains=forced_chains)
        self.engine = WorkerEngine(self.workload.model_path, self.workload.trie_path, config)

    def warm_up(self) -> None:
        """One group."""
        self.engine.generate(self.workload.prompts[:1], [0], [0])

    def run(self, group_size: int = 16) -> list[list[list[int]]]:
        """Tokens of every candidate of every group."""
        prompts = self.workload.prompts
        none = [0] * len(prompts)
        return _tokens(self.engine.generate(prompts, none, none, group_size=group_size))

    def fed(self) -> dict[str, Any]:
        """See fed_tokens."""
        return fed_tokens(self.workload, self.run)

    def sizes(self) -> list[dict[str, float]]:
        """See by_group_size."""
        return by_group_size(len(self.workload.prompts), self.run)

    def close(self) -> None:
        self.engine.shutdown()


class TokenByToken(Ours):
    """The same search with one pass for every token of a forced chain."""

    def __init__(self, shape: str, folder: str) -> None:
        super().__init__(shape, folder, "token_by_token")


class HuggingFace:
    """The published way on a shape."""

    def __init__(self, shape: str, folder: str) -> None:
        torch.set_num_threads(threads())
        self._workload = SHAPES[shape](Path(folder))
        trie = Trie.load(self._workload.trie_path)
        path, dtype = str(self._workload.model_path), self._workload.dtype
        self._trainer = PublishedTrainer(path, trie, dtype=dtype, beta=0.0)  # needs no reference

    def warm_up(self) -> None:
        """One group."""
        self._trainer.generate(self._workload.prompts[:1])

    def run(self) -> list[list[list[int]]]:
        """Tokens of every candidate of every group."""
        prompts, at_once = self._workload.prompts, self._workload.generate_groups
        rows: list[list[int]] = []
        for start in range(0, len(prompts), at_once):
            rows += self._trainer.generate(prompts[start : start + at_once]).tokens()
        return [rows[i : i + 16] for i in range(0, len(rows), 16)]


class OneToken:
    """One-token requests on a shape."""

    def __init__(self, shape: str, folder: str) -> None:
        self._workload = SHAPES[shape](Path(folder))
        config = settings(self._workload)
        self._engine = OneTokenRequests(self._workload.model_path, self._workload.trie_path, config)

    def warm_up(self) -> None:
        """One group."""
        self._engine.generate(self._workload.prompts[:1])

    def run(self) -> list[list[list[int]]]:
        """Tokens of every candidate of every group."""
        return _tokens(self._engine.generate(self._workload.prompts))

    def close(self) -> None:
        self._engine.shutdown()


def against(case: str, opponent: str, shape: str, folder: Path, ours: Side, repeats: int) -> Row:
    """Ours and theirs in turn, both warmed up. Of several pairs the first shows the memory, the others the time."""
    with Side(f"benchmarks.rollout:{opponent}", shape, str(folder), as_worker=opponent == "TokenByToken") as theirs:
        theirs.call("warm_up")
        calls = [(ours.call("run"), theirs.call("run"))]
        for _ in range(repeats if repeats > 1 else 0):
            pair = [side.call("run", watched=False, at_least_s=STEADY_S) for side in (ours, theirs)]
            calls.append((pair[0], pair[1]))
    same = same_candidates(*(call.result for call in calls[0]))
    rounds = SHAPES[shape](folder).dtype == "bfloat16"  # differently on both sides
    assert same == 1.0 or rounds, f"{shape}: {1 - same:.2%} of candidates differ from {case}"
    counted = calls[repeats > 1 :]
    note = f"{same:.0%} of candidates at the same place" if rounds else ""
    row = row_of_pairs(case, shape, [(mine.seconds, other.seconds) for mine, other in counted], note=note)
    return with_memory(row, *calls[-1])


def same_candidates(ours: Sequence[Sequence[object]], theirs: Sequence[Sequence[object]]) -> float:
    """Share of places in all groups that hold the same candidate."""
    pairs = [pair for groups in zip(ours, theirs, strict=True) for pair in zip(*groups, strict=True)]
    return sum(mine == other for mine, other in pairs) / len(pairs)


def fed_tokens(workload: RolloutWorkload, run: Callable[[], object]) -> dict[str, Any]:
    """Tokens through the model against the least possible, and the share of time that the model's forward takes."""
    with counted_forwards() as work, _counted_visits() as visits:
        seconds = timed(run)
    visited, groups = sum(visits), len(workload.prompts)
    return {
        "shape": workload.name,
        "tokens_per_group": work.tokens / groups,
        "least_per_group": (_distinct_prefixes(workload.prompts) + visited) / groups,
        "without_sharing_prompts": (sum(map(len, workload.prompts)) + visited) / groups,
        "forward_share": (work.forward_s + work.logits_s) / seconds,
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


def by_group_size(groups: int, run: Callable[[int], object]) -> list[dict[str, float]]:
    """Groups per second for every G."""
    points = []
    for size in GROUP_SIZES:
        run(size)
        seconds = min(timed(partial(run, size)) for _ in range(2))
        points.append({"group_size": size, "groups_per_second": groups / seconds})
    return points


def by_catalogue(folder: Path) -> list[dict[str, float]]:
    """Time per forward token for every size of the catalogue, the title's length alike."""
    points = []
    for titles in CATALOGUES:
        with Side("benchmarks.rollout:OnCatalogue", titles, str(folder), as_worker=True) as side:
            points.append(side.call("measure").result)
    return points


class OnCatalogue:
    """The tiny model on a random catalogue of any size."""

    def __init__(self, titles: int, folder: str) -> None:
        base = tiny(Path(folder))
        self._prompts, self._titles = base.prompts, titles
        path = Path(folder) / f"catalogue-{titles}.arrow"
        random_trie(np.random.default_rng(0), titles, 14, 1536, EOS).save(path)
        self._engine = WorkerEngine(base.model_path, path, settings(base))

    def measure(self) -> dict[str, float]:
        with counted_forwards() as work:
            self._run()
        seconds = min(timed(self._run) for _ in range(5))
        return {"titles": self._titles, "seconds": seconds, "microseconds_per_token": 1e6 * seconds / work.tokens}

    def _run(self) -> None:
        none = [0] * len(self._prompts)
        self._engine.generate(self._prompts, none, none)

    def close(self) -> None:
        self._engine.shutdown()


def measure(shape: str, folder: Path) -> tuple[list[Row], dict[str, Any], list[dict[str, float]]]:
    """Rows, fed tokens and, for the tiny shape, groups per second by G."""
    repeats = SHAPES[shape](folder).repeats
    with Side("benchmarks.rollout:Ours", shape, str(folder), as_worker=True) as ours:
        ours.call("warm_up")
        rows = [against("hugging-face", "HuggingFace", shape, folder, ours, repeats)]
        fed, sizes = ours.call("fed").result, []
        if shape == "tiny-64":
            rows.append(against("one-token-requests", "OneToken", shape, folder, ours, repeats))
            rows.append(against("chains-token-by-token", "TokenByToken", shape, folder, ours, repeats))
            sizes = ours.call("sizes", watched=False).result
    return rows, fed, sizes


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Entries of equal keys as a Markdown table."""
    names = list(entries[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    for entry in entries:
        values = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in entry.values())
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def main(shapes: Sequence[str]) -> None:
    rows: list[Row] = []
    content: dict[str, Any] = {"fed": [], "group_sizes": [], "catalogues": []}
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            if shape == BY_CATALOGUE:
                content["catalogues"] = by_catalogue(Path(folder))
                write(rows, content)
                continue
            try:
                measured, fed, sizes = measure(shape, Path(folder))
            except ShapeAbsentError as absent:
                print(f"{shape}: skipped, {absent}", flush=True)
                continue
            rows += measured
            content["fed"].append(fed)
            content["group_sizes"] += sizes
            write(rows, content)


def write(rows: Sequence[Row], content: dict[str, Any]) -> None:
    """All that is known so far."""
    tables = [markdown(rows), *(table(entries) for entries in content.values() if entries)]
    write_section("Rollouts", "\n\n".join(tables), {"rows": [vars(row) for row in rows], **content})


def _tokens(groups: Sequence[Candidates]) -> list[list[list[int]]]:
    return [[tokens.tolist() for tokens in group.tokens] for group in groups]


if __name__ == "__main__":
    main(sys.argv[1:] or (*SHAPES, BY_CATALOGUE))
