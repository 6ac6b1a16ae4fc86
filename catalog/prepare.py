"""From raw interactions to a data folder: time window, k-core, histories, splits by time."""

import argparse
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catalog.atomic import atomic_folder
from catalog.columns import Columns, ItemIndex
from catalog.errors import CatalogError
from catalog.interactions import cut_by_time, sliding_histories
from catalog.ragged import Ragged


def prepare(
    interactions: Path,
    items: Path,
    out_dir: Path,
    *,
    k: int = 5,
    start: str | None = None,
    end: str | None = None,
    max_title_words: int = 20,
    max_history: int = 10,
) -> dict[str, int]:
    """Write items.parquet and {train,valid,test}.parquet to `out_dir` as the paper makes its data; return the counts.

    interactions: Parquet or CSV (.csv, .csv.gz, .csv.bz2, ...) of (user_id, item_id, timestamp). items: the same of
    (item_id, title).
    Kept are interactions from day `start` up to but not including day `end` (YYYY-MM-DD, UTC) with items whose title
    is present and has at most max_title_words words; then users and items with fewer than k interactions are
    removed until none is left. Each user's interactions in time order (the file's order where times are equal) give
    one example per position but the first, with the up to max_history items before it; all examples, sorted by
    time, are cut 80/10/10. Raises CatalogError for bad files, an out_dir that exists, or when nothing is left.
    """
    _check_new(out_dir)
    if max_history < 1:
        raise CatalogError(f"max_history={max_history}: a prompt needs at least one item")
    if k < 1:
        raise CatalogError(f"k={k}: give 1 or more; 1 leaves out nothing")
    first_time, end_time = _window(start, end)
    catalogue = _columns(items, "item_id", "title")
    log = _columns(interactions, "user_id", "item_id", "timestamp")
    index = ItemIndex(catalogue, "item_id")
    titles = catalogue.titles_with_nulls("title")
    usable = np.append(_short_titles(titles, max_title_words), False)  # the last is for unknown items, row -1
    row_of = index.known(log, "item_id")
    if (row_of < 0).all():
        first = log.ids("item_id")[0].as_py()
        raise log.fault(
            "item_id", 0, f"neither item {first!r} nor any other is in {items.name}; give both the same ids"
        )
    users, time = pc.dictionary_encode(log.texts("user_id")), log.seconds("timestamp")
    user, instant = users.indices.to_numpy(), log.instants("timestamp")

    within = (time >= first_time) & (time < end_time)
    titled = np.flatnonzero(within & usable[row_of])
    kept = titled[_k_core(user[titled], row_of[titled], k)]
    if not len(kept):
        words = f"an item in {items.name} with a title of at most max_title_words={max_title_words} words"
        raise _nothing_left(interactions, time, f"start={start} and end={end}", within, words, titled, k)
    rows, histories = _examples(kept, user, row_of, instant, max_history)
    examples = pa.table(
        {
            "user_id": users.dictionary.take(pa.array(user[rows])),
            "history": pa.LargeListArray.from_arrays(histories.start, index.ids.take(pa.array(histories.flat))),
            "target": index.ids.take(pa.array(row_of[rows])),
            "timestamp": time[rows],
        }
    )
    splits = {split: examples[part] for split, part in cut_by_time(time[rows]).items()}
    for split, table in splits.items():
        if not len(table):
            raise CatalogError(f"{interactions}: only {len(rows)} examples are left, too few for a {split} split")
    used = pa.array(np.unique(row_of[kept]))
    _write(out_dir, pa.table({"item_id": index.ids.take(used), "title": titles.take(used)}), splits)
    return {
        "interactions": len(time),
        "interactions_kept": len(kept),
        "of_them_repeated": len(kept) - _distinct(user[kept], row_of[kept], instant[kept]),
        "users": len(np.unique(user[kept])),
        "items": len(used),
        **{split: len(table) for split, table in splits.items()},
    }


def _columns(file: Path, *names: str) -> Columns:
    if re.search(r"\.csv(\.(gz|bz2|lz4|zst))?$", file.name.lower()):
        return Columns.of_csv(file, *names, texts=["title"], ids=["user_id", "item_id"])
    if file.is_file() and not _begins_with(file, b"PAR1"):
        raise CatalogError(f"{file}: its content is no Parquet, and its name does not end in .csv or .csv.gz")
    return Columns.of_parquet(file, *names)


def _begins_with(file: Path, magic: bytes) -> bool:
    with file.open("rb") as content:
        return content.read(len(magic)) == magic


def _check_new(out_dir: Path) -> None:
    if out_dir.exists():
        raise CatalogError(f"{out_dir}: exists; choose another folder or delete it")


def _k_core(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """Positions of the largest part of n interactions in which every user and every item occurs k times or more."""
    kept = np.arange(len(user))
    while True:
        dense = (np.bincount(user[kept])[user[kept]] >= k) & (np.bincount(item[kept])[item[kept]] >= k)
        if dense.all():
            return kept
        kept = kept[dense]


def _distinct(*columns: np.ndarray) -> int:
    """Number of distinct rows."""
    order = np.lexsort(columns)
    changes = [column[order][1:] != column[order][:-1] for column in columns]
    return 1 + int(np.logical_or.reduce(changes).sum())


def _nothing_left(
    file: Path, time: np.ndarray, window: str, within: np.ndarray, words: str, titled: np.ndarray, k: int
) -> CatalogError:
    """The error that says what each filter left. within: bool [n]. titled: the rows within that have `words`."""
    first, last = np.array([time.min(), time.max()], "datetime64[s]").astype("datetime64[D]")
    return CatalogError(
        f"{file}: nothing is left of {len(time)} interactions from {first} to {last}. Within {window} are "
        f"{within.sum()}; of these {len(titled)} have {words}; of these none is left where every user and every item "
        f"must have k={k} of them. Loosen the one that leaves too few"
    )


def _examples(
    kept: np.ndarray, user: np.ndarray, item: np.ndarray, instant: np.ndarray, max_history: int
) -> tuple[np.ndarray, Ragged]:
    """The target of every example as a row of the log, and its history of items; examples in time order.

    kept: rows of the log. user, item, instant: of every row.
    """
    by_user = kept[np.lexsort((instant[kept], user[kept]))]
    _, lengths = np.unique(user[by_user], return_counts=True)
    targets, histories = sliding_histories(item[by_user], lengths, max_history)
    order = np.argsort(instant[by_user[targets]], kind="stable")
    return by_user[targets[order]], histories.take(order)


def _short_titles(titles: pa.LargeStringArray, max_words: int) -> np.ndarray:
    """bool [items]: a title that is there and has at most max_words words; others are left out, not an error."""
    trimmed = pc.utf8_trim_whitespace(pc.fill_null(titles, ""))
    words = pc.list_value_length(pc.utf8_split_whitespace(trimmed)).to_numpy()
    return (pc.utf8_length(trimmed).to_numpy() > 0) & (words <= max_words)


def _window(start: str | None, end: str | None) -> tuple[int, int]:
    """Seconds since 1970 at the beginning of two days; without limits where there is no day."""
    first, after = _day(start, -(2**62)), _day(end, 2**62)
    if first >= after:
        raise CatalogError(f"start={start} is not before end={end}, the first day that is left out")
    return first, after


def _day(day: str | None, unlimited: int) -> int:
    if day is None:
        return unlimited
    try:
        return int(datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC).timestamp())
    except ValueError as error:
        raise CatalogError(f"{day!r} is no day; write it as 2018-11-30") from error


def _write(out_dir: Path, items: pa.Table, splits: dict[str, pa.Table]) -> None:
    with atomic_folder(out_dir) as temporary:
        pq.write_table(items, temporary / "items.parquet")
        for split, table in splits.items():
            pq.write_table(table, temporary / f"{split}.parquet")
        _check_new(out_dir)  # again: another process may have made it meanwhile


def main(arguments: Sequence[str] | None = None) -> int:
    """`rere prepare INTERACTIONS ITEMS OUT`: prepare, and print what is left."""
    parser = argparse.ArgumentParser(prog="rere prepare", description=__doc__)
    parser.add_argument("interactions", type=Path, help="Parquet, .csv or .csv.gz with user_id, item_id, timestamp")
    parser.add_argument("items", type=Path, help="Parquet, .csv or .csv.gz with item_id, title")
    parser.add_argument("out", type=Path, help="data folder to write; must not exist")
    parser.add_argument("--k", type=int, default=5, help="fewest interactions of a user and of an item (5)")
    parser.add_argument("--start", help="first day, YYYY-MM-DD")
    parser.add_argument("--end", help="day after the last, YYYY-MM-DD")
    parser.add_argument("--max-title-words", type=int, default=20, help="longer titles are left out (20)")
    parser.add_argument("--max-history", type=int, default=10, help="items before a target (10)")
    given = parser.parse_args(arguments)
    counts = prepare(
        given.interactions,
        given.items,
        given.out,
        k=given.k,
        start=given.start,
        end=given.end,
        max_title_words=given.max_title_words,
        max_history=given.max_history,
    )
    print("\n".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in counts.items()))
    return 0
