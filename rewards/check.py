"""`rere reward check SPEC`: run a reward on sample groups and show what it gave."""

import argparse
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from yaml import YAMLError

from catalog.catalog import Catalog
from catalog.visible import visible
from rewards.config import RewardTerm
from rewards.errors import RewardError
from rewards.group import Group, Groups
from rewards.interface import make_reward, score
from rewards.registry import resolve
from rewards.samples import groups_of_catalog, sample_groups

PATIENCE_S = 10.0


def main(argv: Sequence[str]) -> int:
    """Check the reward that the command line names; 0 when it is fit for a run. Raises RewardError when it is not."""
    options = _parser().parse_args(argv)
    args = _keyword_arguments(options.args)
    if options.catalog:
        groups = groups_of_catalog(Catalog.load(options.catalog), options.split, options.groups, options.candidates)
    else:
        groups = sample_groups()
    check(options.spec, args, groups, Console())
    return 0


def check(spec: str, args: dict[str, Any], groups: Groups, console: Console) -> pa.ListArray:
    """Score `groups` with the reward `spec` as a run would, print each group with its rewards, return them.

    Raises RewardError for a reward that cannot be made, raises, or returns nonsense.
    """
    key = RewardTerm(spec).key
    with _patience(key):
        rewards = score(key, make_reward(key, resolve(spec), groups.catalog, args), groups)
    for group, values in zip(groups, rewards.to_pylist(), strict=True):
        console.print(f"group {group.example_id}, user {_shown(group.user_id)}", style="bold")
        console.print(f"history  {_shown(' | '.join(group.history_titles))}", soft_wrap=True)
        console.print(f"target   {_shown(group.target_title)}", soft_wrap=True)
        console.print(_table(group, key, values), "")
    _summary(console, key, groups, rewards)
    return rewards


@contextmanager
def _patience(key: str) -> Iterator[None]:
    """Say of a reward that takes long that it is still at work; it has as long as it likes."""

    def say() -> None:
        print(f"reward {key!r} has been at work for {PATIENCE_S:g} s; Ctrl-C ends it", file=sys.stderr, flush=True)

    timer = threading.Timer(PATIENCE_S, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _keyword_arguments(written: Sequence[str]) -> dict[str, Any]:
    """From KEY=VALUE, the values in YAML. Raises RewardError naming what is something else."""
    tree = OmegaConf.create()
    for text in written:
        key, equals, _ = text.partition("=")
        if not key or not equals:
            raise RewardError(f"--args {text!r}: write KEY=VALUE")
        try:
            tree.merge_with_dotlist([text])
        except (YAMLError, OmegaConfBaseException, UnicodeError) as error:
            raise RewardError(f"--args {text!r}: the value is not readable as YAML: {error}") from error
    try:
        args = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise RewardError(f"--args {error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(args, dict)
    return {str(key): value for key, value in args.items()}


def _shown(text: str) -> str:
    """A text of the data as rich's markup of itself."""
    return escape(visible(text))


def _table(group: Group, key: str, values: list[float]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("")
    table.add_column("candidate")
    table.add_column("score", justify="right")
    table.add_column(escape(key), justify="right")
    for rank, (item_class, candidate, of_search, value) in enumerate(
        zip(group.candidate_classes, group.candidate_titles, group.scores, values, strict=True)
    ):
        hit = item_class == group.target_class
        shown = _shown(candidate) or "(no title)"
        row = (str(rank), "hit" if hit else "", shown, f"{of_search:.2f}", f"{value:+.4f}")
        table.add_row(*row, style="bold green" if hit else None)
    return table


def _summary(console: Console, key: str, groups: Groups, rewards: pa.ListArray) -> None:
    values = groups.layout.flat(rewards)
    flat = [row for row in rewards.to_pylist() if len(set(row)) == 1]
    console.print(
        f"{escape(key)}: {len(values)} candidates in {len(groups)} groups, mean {values.mean():+.4f}, "
        f"std {np.std(values):.4f}, from {values.min():+.4f} to {values.max():+.4f}",
        soft_wrap=True,
    )
    if flat:
        console.print(
            f"{len(flat)} of {len(groups)} groups got one and the same reward throughout: alone, this term would "
            "teach nothing there",
            soft_wrap=True,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rere reward check", description=__doc__)
    parser.add_argument("spec", help="registered name, package.module:Name or path/file.py:name")
    parser.add_argument("--args", nargs="*", default=[], metavar="KEY=VALUE", help="keyword arguments of the reward")
    parser.add_argument("--catalog", type=Path, help="folder of a built catalogue; without it, a built-in sample")
    parser.add_argument("--split", default="train", help="with --catalog: whose examples")
    parser.add_argument("--groups", type=int, default=4, help="with --catalog: number of groups")
    parser.add_argument("--candidates", type=int, default=8, help="with --catalog: candidates of a group")
    return parser
