"""Time of a training step against the size of everything: one plot each, beside the line of its arithmetic.

A step here is rollout, reference, learn and sync on a random model of fixed size and random titles, so that every size
can be varied alone. The arithmetic is what must be computed: the floating-point operations of the tokens that the
rollout feeds and of those that the learner feeds forward and back, attention and vocabulary included. The line goes
through the first point; nothing may grow faster than it. All sizes of a sweep are measured in turn, round by round,
since a machine that others use too is slower for minutes at a time.
"""

import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arithmetic import Arithmetic, packed_work
from benchmarks.harness import REPOSITORY, timed, write_section
from benchmarks.in_process import InProcess, counted_forwards
from benchmarks.shapes import SHAPES, build
from benchmarks.sides import Side
from catalog.trie import Trie
from rollout.groups import Candidates

FIGURES = REPOSITORY / "docs/figures"
ROUNDS = 4
SLACK = 1.5
"""How much faster than its arithmetic a step may grow before it is said, over the whole range."""


@dataclass(frozen=True)
class Workload:
    """Sizes of one step."""

    titles: int = 4000
    prompt_tokens: int = 200
    title_tokens: int = 16
    group_size: int = 16
    groups: int = 16


SWEEPS: dict[str, tuple[str, Sequence[int]]] = {
    "titles": ("titles in the catalogue", (1_000, 10_000, 100_000, 1_000_000)),
    "prompt_tokens": ("tokens of a prompt", (50, 100, 200, 400, 800)),
    "title_tokens": ("tokens of a title", (8, 16, 32, 64)),
    "group_size": ("candidates of a group (G)", (4, 8, 16, 32, 64)),
    "groups": ("groups of a step", (4, 8, 16, 32, 64)),
}


@dataclass(frozen=True)
class Point:
    """One measured size. Seconds are the fastest of ROUNDS, the least disturbed by other work on the machine."""

    size: int
    seconds: float
    rollout_s: float
    learn_s: float
    sync_s: float
    gflop: float
    """Arithmetic of rollout, reference, policy forward, and the backward pass counted twice."""


class Stepper:
    """Measures steps over one trie of random titles; lives in a process of its own."""

    def __init__(self, titles: int, title_tokens: int) -> None:
        base = build(SHAPES["tiny-64"])
        self.vocabulary = int(base.catalog.trie.edge_token.max()) + 1
        self.rng = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trie.arrow"
            random_trie(self.rng, titles, title_tokens, self.vocabulary, base.catalog.eos_token).save(path)
            self.step = InProcess(base.config, base.model_path, base.catalog, path)
        self.arithmetic = Arithmetic(base.model_path)
        self.prepared: dict[tuple[int, int, int], tuple[list[list[int]], list[Candidates]]] = {}

    def prepare(self, prompt_tokens: int, group_size: int, groups: int) -> float:
        """Roll out and learn once, for `measure` to do it again; GFLOP of the arithmetic."""
        prompts = self.rng.integers(0, self.vocabulary, (groups, prompt_tokens)).astype(np.int32).tolist()
        with counted_forwards() as counted:
            candidates = self.step.rollout(prompts, group_size)
        rollout = self.arithmetic.forward(counted)
        forward = self.arithmetic.forward(packed_work(self.step.packed(prompts, candidates)))
        self.step.learn(prompts, candidates)
        self.prepared[prompt_tokens, group_size, groups] = prompts, candidates
        return (rollout + 4 * forward) / 1e9

    def measure(self, prompt_tokens: int, group_size: int, groups: int) -> tuple[float, float, float]:
        """Seconds of rollout, learn and sync of what was prepared."""
        prompts, candidates = self.prepared[prompt_tokens, group_size, groups]
        return (
            timed(lambda: self.step.rollout(prompts, group_size)),
            timed(lambda: self.step.learn(prompts, candidates)),
            timed(self.step.sync),
        )


def random_trie(rng: np.random.Generator, titles: int, length: int, vocabulary: int, eos: int) -> Trie:
    """Distinct titles of `length` tokens, end-of-sequence included, that share beginnings as product titles do."""
    brands = rng.integers(0, vocabulary, (max(32, titles // 100), 2))
    tokens = rng.integers(0, vocabulary, (2 * titles, length - 1))
    tokens[:, :2] = brands[rng.integers(0, len(brands), 2 * titles)]
    tokens[tokens == eos] = (eos + 1) % vocabulary
    distinct = np.unique(tokens, axis=0)
    kept = distinct[rng.permutation(len(distinct))[:titles]]
    ended = np.concatenate([kept, np.full((len(kept), 1), eos)], 1)
    return Trie.from_titles(ended, eos_token=eos, tokenizer_fingerprint="random titles")


def sweep(name: str) -> list[Point]:
    """Points of one sweep, smallest first; sizes on the same trie are measured by the same process."""
    sizes = SWEEPS[name][1]
    works = [replace(Workload(), **{name: size}) for size in sizes]
    tries = [(work.titles, work.title_tokens) for work in works]
    steps = [(work.prompt_tokens, work.group_size, work.groups) for work in works]
    with ExitStack() as stack:
        started = {
            trie: stack.enter_context(Side("benchmarks.growth:Stepper", *trie, as_worker=True)) for trie in set(tries)
        }
        steppers = [started[trie] for trie in tries]

        def called(method: str) -> list[Any]:
            pairs = zip(steppers, steps, strict=True)
            return [stepper.call(method, *step, watched=False).result for stepper, step in pairs]

        gflop = called("prepare")
        seconds = np.min([called("measure") for _ in range(ROUNDS)], axis=0).tolist()
    return [
        Point(size, rollout_s + learn_s + sync_s, rollout_s, learn_s, sync_s, work)
        for size, (rollout_s, learn_s, sync_s), work in zip(sizes, seconds, gflop, strict=True)
    ]


def growth_beyond_arithmetic(points: Sequence[Point]) -> float:
    """How many times more the time grew over the whole range than the arithmetic did."""
    return (points[-1].seconds / points[0].seconds) / (points[-1].gflop / points[0].gflop)


def plot(name: str, points: Sequence[Point]) -> Path:
    """Seconds per step and its stages, with the arithmetic through the first point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    sizes = [point.size for point in points]
    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    axes.plot(sizes, [point.seconds for point in points], "o-", label="step")
    for stage, marker in (("learn_s", "s"), ("rollout_s", "^"), ("sync_s", "x")):  # not by colour alone
        values = [getattr(point, stage) for point in points]
        axes.plot(sizes, values, f"{marker}:", ms=5, label=stage.removesuffix("_s"))
    arithmetic = [points[0].seconds * point.gflop / points[0].gflop for point in points]
    axes.plot(sizes, arithmetic, "k--", label="arithmetic")
    axes.set(xscale="log", yscale="log", xlabel=SWEEPS[name][0], ylabel="seconds per step")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize="small", handlelength=1.5)
    FIGURES.mkdir(parents=True, exist_ok=True)
    path = FIGURES / f"growth-{name.replace('_', '-')}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def markdown(results: dict[str, list[Point]]) -> str:
    lines = ["| varied | from | to | time grew | arithmetic grew | beyond arithmetic |", "|---|---|---|---|---|---|"]
    for name, points in results.items():
        first, last, beyond = points[0], points[-1], growth_beyond_arithmetic(points)
        lines.append(
            f"| {SWEEPS[name][0]} | {first.size} | {last.size} | {last.seconds / first.seconds:.2f}x "
            f"| {last.gflop / first.gflop:.2f}x | {beyond:.2f}{' (!)' if beyond > SLACK else ''} |"
        )
    return "\n".join(lines)


def main(*names: str) -> None:
    results = {name: sweep(name) for name in names or SWEEPS}
    for name, points in results.items():
        print(plot(name, points), flush=True)
    content = {name: [vars(point) for point in points] for name, points in results.items()}
    write_section("Growth of a step", markdown(results), {"growth": content})


if __name__ == "__main__":
    main(*sys.argv[1:])
