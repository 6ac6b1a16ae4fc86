"""`rere compare`: finished runs side by side, and how sure it is that one is better than the first."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from catalog.catalog import Catalog
from catalog.errors import CatalogError
from catalog.metrics import ndcg_per_example, paired_bootstrap
from launch.compose import load
from launch.config import ConfigError
from launch.progress import Progress
from launch.started_with import StartedWith

EVALUATED = "eval-rl.json"


def main(arguments: Sequence[str]) -> int:
    """Print the table; 0 when it succeeded."""
    parser = argparse.ArgumentParser(prog="rere compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs, such as runs/*")
    runs = finished(parser.parse_args(arguments).runs)
    columns, rows = comparison(runs)
    Progress().table(f"NDCG@{runs[0].k}; gain over {runs[0].name}", columns, rows)
    return 0


def finished(paths: Sequence[Path]) -> list["FinishedRun"]:
    """The finished ones of several runs; the others, and what is no run, are named on the error stream.

    Raises ConfigError without any, and for a path that does not exist.
    """
    left_out = [path for path in paths if path.exists() and not (path / "summary.json").exists()]
    if len(left_out) == len(paths):
        left_out = []
    if left_out:
        print(f"no finished runs, so left out: {', '.join(path.name for path in left_out)}", file=sys.stderr)
    return [FinishedRun(path) for path in paths if path not in left_out]


class FinishedRun:
    """What a finished run has left of its evaluation. Raises ConfigError naming the file that is missing."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ConfigError(f"there is no run {path}")
        self.name, self._path = path.resolve().name, path
        with self._reading("summary.json") as summary:
            self._metrics = {phase: dict(summary["metrics"][phase]) for phase in ("sft", "rl")}
            self.model, self.steps = Path(summary["model"]).name, int(summary["steps"])
            self.step_s = float(summary["timing_s"]["step"])
        with self._reading(EVALUATED) as after:
            self._ids, self._hit_ranks = (np.array(after[key], np.int64) for key in ("example_ids", "hit_ranks"))
            if self._ids.ndim != 1 or self._ids.shape != self._hit_ranks.shape:
                raise ValueError(f"{self._ids.shape} examples have {self._hit_ranks.shape} ranks")
        self.config = replace(load(path / "config.yaml"), name=path.resolve().name, runs=str(path.resolve().parent))
        self.k = max(self.config.train.eval_ks)

    @contextmanager
    def _reading(self, file: str) -> Iterator[dict[str, Any]]:
        """The content of a file; ConfigError naming it where it is not what the block takes it for."""
        try:
            yield json.loads((self._path / file).read_text())
        except OSError as error:
            raise ConfigError(f"{self._path / file}: {error.strerror}; only finished runs can be compared") from error
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise ConfigError(
                f"{self._path / file} is damaged ({error!r}); only finished runs can be compared"
            ) from error

    def metric(self, phase: str, name: str) -> float | None:
        """phase: "sft" or "rl". None where the run has not measured it."""
        return self._metrics[phase].get(name)

    @cached_property
    def examples(self) -> list[tuple[Any, Any]] | None:
        """(user, target item) of each evaluated example; None where the run's catalogue is no longer in the cache."""
        try:
            folder = StartedWith.of(self.config).catalogue(self.config.data)
            catalog = Catalog.load(folder) if folder else None
        except (ConfigError, CatalogError):
            return None
        if catalog is None:
            return None
        test, ids = catalog.examples("test"), self._ids
        if ids.size and not 0 <= ids.min() <= ids.max() < len(test):
            raise ConfigError(f"{self._path / EVALUATED} is damaged: the test split has {len(test)} examples")
        targets = catalog.item_ids.take(pa.array(test.target_item[ids])).to_pylist()
        return [(test.user_id(example_id), target) for example_id, target in zip(ids, targets, strict=True)]

    def gain_over(self, other: "FinishedRun", k: int) -> dict[str, float | None] | str:
        """paired_bootstrap of NDCG@k from another run to this one, or why there is none."""
        if k > self.k:
            return "not measured"
        if self.examples is None or other.examples is None:
            return "catalogue not found"
        if self.examples != other.examples:
            return "other examples"
        before, after = (ndcg_per_example(run._hit_ranks, k) for run in (other, self))
        return paired_bootstrap(before, after, [user for user, _ in self.examples], seed=0)


def comparison(runs: Sequence[FinishedRun]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table; the gains are those over the first run."""
    first, k = runs[0], runs[0].k
    columns = ["run", "model", "steps", "before RL", "RL", "gain", "95% interval", "s / step"]
    return columns, [_row(run, first, k) for run in runs]


def _row(run: FinishedRun, first: FinishedRun, k: int) -> list[str]:
    gain = "" if run is first else run.gain_over(first, k)
    before, after = (run.metric(phase, f"ndcg@{k}") for phase in ("sft", "rl"))
    return [
        run.name,
        run.model,
        str(run.steps),
        "not measured" if before is None else f"{before:.4f}",
        "not measured" if after is None else f"{after:.4f}",
        *_gain_words(gain),
        f"{run.step_s:.2f}",
    ]


def _gain_words(gain: dict[str, float | None] | str) -> tuple[str, str]:
    if isinstance(gain, str):
        return "", gain
    if gain["low"] is None:
        return f"{gain['mean']:+.4f}", "one user"
    return f"{gain['mean']:+.4f}", f"{gain['low']:+.4f} to {gain['high']:+.4f}"
