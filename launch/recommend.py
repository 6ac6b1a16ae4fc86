"""`rere recommend`: the titles that the policy of a run recommends after given ones."""

import argparse
import difflib
import io
import json
import sys
import unicodedata
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catalog.catalog import Catalog
from catalog.config import DataConfig
from catalog.template import prompt_texts
from catalog.tokenizer import encode_prompts, load_tokenizer
from launch.config import ConfigError
from launch.policy_of_run import PolicyOfRun
from launch.progress import Progress
from rollout.groups import Candidates

KV_CACHE_GIB = 1 / 16
"""For each beam, at most; a run's own cache may be sized for hundreds of groups at once, and histories that do not fit
together go in turn."""
AT_ONCE = 64
"""Histories whose titles are printed together."""
UNKNOWN_SHOWN = 3
PIECE, COMPARED = 4, 1000
"""Characters of a piece of a title; titles that are compared whole."""


def main(arguments: Sequence[str]) -> int:
    """Print a table for titles given as arguments, a line of JSON per history for a file of them; 0 on success."""
    options = _parser().parse_intermixed_args(arguments)
    if options.count < 1:
        raise ConfigError(f"--count must be 1 or more, got {options.count}")
    if bool(options.titles) == (options.file is not None):
        raise ConfigError("give the titles of one history, oldest first, or --file with a list of titles per line")
    if not all(map(_is_text, options.titles)):
        raise ConfigError("a title of the command line is not UTF-8")
    if not all(title.strip() for title in options.titles):
        raise ConfigError("a title of the command line is empty")
    histories = list(histories_of_file(options.file)) if options.file else [options.titles]
    if not histories:
        raise ConfigError(f"{options.file} is empty: a list of titles per line is needed")
    policy = PolicyOfRun.of(options.run, options.checkpoint)
    catalog = policy.catalog
    for history, group in zip(
        histories, recommend(policy, histories, options.count, unseen=options.unseen), strict=True
    ):
        if options.file:
            print(json.dumps(_line(group, catalog), ensure_ascii=False), flush=True)
        else:
            Progress().table(f"after {' · '.join(history)}", *_table(group, catalog))
    return 0


def recommend(
    policy: PolicyOfRun, histories: Sequence[Sequence[str]], count: int, *, unseen: bool = False
) -> Iterator[Candidates]:
    """For each history of titles, oldest first, the `count` best by constrained beam search, as they are found.

    The beams are those of the run's evaluation, train.eval_beams, or `count` where that is more: a narrow beam loses
    titles. unseen: leave out the titles of the history, by as many more beams. A title that the catalogue does not
    have is read all the same, with a word on the error stream.
    """
    rollout, catalog = policy.config.rollout, policy.catalog
    known = _known(histories, catalog)
    _mention_unknown([title for title, item_class in known.items() if item_class is None], catalog)
    left_out = [{known[title] for title in history} - {None} if unseen else set() for history in histories]
    beams = max(count, policy.config.train.eval_beams) + max(map(len, left_out))
    rollout = replace(rollout, kv_cache_gib=min(rollout.kv_cache_gib, max(beams, 16) * KV_CACHE_GIB))
    with policy.engine(rollout) as engine:
        for first in range(0, len(histories), AT_ONCE):
            some = slice(first, first + AT_ONCE)
            prompts = prompt_tokens(policy.config.data, str(policy.checkpoint), histories[some])
            nothing = [0] * len(prompts)
            groups = engine.generate(prompts, nothing, nothing, group_size=beams, strategy="beam")
            for group, classes in zip(groups, left_out[some], strict=True):
                yield _best(group, count, classes)


def prompt_tokens(data: DataConfig, tokenizer_path: str, histories: Sequence[Sequence[str]]) -> list[list[int]]:
    """Token ids of the prompts as training saw them, the last titles and tokens where there are too many."""
    texts = prompt_texts(data.template, [history[-data.max_history :] for history in histories])
    prompts = encode_prompts(load_tokenizer(tokenizer_path), texts).last(data.max_prompt_tokens)
    return [prompts[row].tolist() for row in range(len(prompts))]


def _best(group: Candidates, count: int, left_out: Set[int | None]) -> Candidates:
    """The first `count` candidates that are none of some classes."""
    ranks = [rank for rank, found in enumerate(group.item_class.tolist()) if found not in left_out]
    return group.take(np.array(ranks[:count], np.int64))


def _known(histories: Sequence[Sequence[str]], catalog: Catalog) -> dict[str, int | None]:
    """The item class of each title, in the order of the titles; None for one that the catalogue does not have.

    Of spellings that differ in Unicode alone, and so may be one class, the catalogue has but the first.
    """
    classes = {title: item_class for item_class, title in enumerate(catalog.titles.to_pylist())}
    known = {title: classes.get(title) for history in histories for title in history}
    if None in known.values():
        composed = {unicodedata.normalize("NFC", title): item_class for title, item_class in classes.items()}
        for title in [title for title, item_class in known.items() if item_class is None]:
            known[title] = composed.get(unicodedata.normalize("NFC", title))
    return known


def _mention_unknown(unknown: Sequence[str], catalog: Catalog) -> None:
    """Name the first of them and what is close to each; count the rest."""
    for title in unknown[:UNKNOWN_SHOWN]:
        close = close_titles(title, catalog.titles)
        words = f"close to it: {', '.join(map(repr, close))}" if close else "nothing is close to it"
        print(f"{title!r} is no title of the catalogue, and read all the same; {words}", file=sys.stderr)
    if len(unknown) > UNKNOWN_SHOWN:
        print(f"so are {len(unknown) - UNKNOWN_SHOWN} other titles", file=sys.stderr)


def close_titles(title: str, titles: pa.LargeStringArray, count: int = 3) -> list[str]:
    """Up to `count` of `titles` that are most like `title`.

    Only those that share most pieces of PIECE characters with it are compared, since one comparison takes 0.1 ms.
    """
    pieces = {title[first : first + PIECE] for first in range(0, max(1, len(title) - PIECE + 1), 2)}
    shared = np.zeros(len(titles), np.int64)
    for piece in pieces:
        shared += pc.match_substring(titles, piece).to_numpy(zero_copy_only=False)
    likely = np.argsort(-shared, kind="stable")[:COMPARED]
    return difflib.get_close_matches(title, titles.take(pa.array(likely)).to_pylist(), n=count)


def histories_of_file(file: Path) -> Iterator[list[str]]:
    """A list of titles of each line. Raises ConfigError naming the line that is no list of titles."""
    try:
        text = io.StringIO(file.read_text(encoding="utf-8-sig"))
        lines = list(text)  # splitlines() also cuts within titles, at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error.strerror if isinstance(error, OSError) else error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ConfigError(f"{file}, line {number} is empty; leave it out, so that every line has its answer")
        try:
            history = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(history, list) or not history or not all(isinstance(title, str) for title in history):
            raise ConfigError(f'{file}, line {number}: a list of titles is needed, such as ["one", "two"]')
        if not all(map(_is_text, history)):
            raise ConfigError(f"{file}, line {number}: a title is half of a character (a lone surrogate)")
        yield history


def _is_text(title: str) -> bool:
    return title == title.encode(errors="ignore").decode()


def _line(group: Candidates, catalog: Catalog) -> dict[str, Any]:
    classes = group.item_class.tolist()
    return {
        "titles": [catalog.title(item_class) for item_class in classes],
        "item_ids": [catalog.item_ids_of_class(item_class) for item_class in classes],
        "logprobs": group.score.tolist(),
    }


def _table(group: Candidates, catalog: Catalog) -> tuple[list[str], list[list[str]]]:
    rows = [
        [title, ", ".join(map(str, ids)), f"{logprob:.2f}"]
        for title, ids, logprob in zip(*_line(group, catalog).values(), strict=True)
    ]
    return ["recommended", "item", "log-probability"], rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rere recommend", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/default")
    parser.add_argument("titles", nargs="*", help="a history, oldest first")
    parser.add_argument("--file", type=Path, help="a JSON list of titles per line; prints a line of JSON for each")
    parser.add_argument("--count", type=int, default=10, help="titles to recommend (10)")
    parser.add_argument("--unseen", action="store_true", help="leave out titles of the history")
    parser.add_argument("--checkpoint", help="one of the run's checkpoints, such as step-40 (the newest)")
    return parser
