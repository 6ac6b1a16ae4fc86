"""Reading a user's folder, in any of three formats, into items and examples."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catalog.columns import Columns, ItemIndex
from catalog.errors import CatalogError, name_files
from catalog.interactions import SPLITS, Interactions, SplitTable, sliding_histories

FORMATS = """a data folder holds one of
  items.parquet (item_id, title) and train.parquet, valid.parquet, test.parquet (user_id, history, target, timestamp)
  items.parquet (item_id, title) and sequences.parquet (user_id, item_ids)
  info.txt (title, tab, item id) and train.csv, valid.csv, test.csv (user_id, history_item_id, item_id, timestamp)
`rere prepare` makes the first of raw interactions (user_id, item_id, timestamp) and items (item_id, title)"""

ITEM_DIGITS = 18
"""Of the numbers in an info file, so that they fit 64 bits."""


@dataclass(frozen=True)
class Source:
    """A folder whose format is known and whose files all exist.

    >>> source = Source.of(Path("data/industrial"))
    >>> source.fingerprint()                       # of the files' bytes
    >>> interactions = source.read(max_history=10)
    """

    files: tuple[Path, ...]
    _read: Callable[[tuple[Path, ...], int], Interactions]

    @classmethod
    def of(cls, folder: Path) -> "Source":
        """Raises CatalogError for a folder that is missing, lacks a file, or has none of the formats."""
        if not folder.is_dir():
            raise CatalogError(f"{folder}: no such folder; {FORMATS}")
        present = {path.name for path in folder.iterdir() if path.exists()}  # a link may lead nowhere
        if "info.txt" in present and "items.parquet" not in present:
            names, read = ("info.txt", *(f"{split}.csv" for split in SPLITS)), _read_csv
        elif "sequences.parquet" in present and "train.parquet" not in present:
            names, read = ("items.parquet", "sequences.parquet"), _read_sequences
        else:
            names, read = ("items.parquet", *(f"{split}.parquet" for split in SPLITS)), _read_splits
        folders = [name for name in names if (folder / name).is_dir()]
        if folders:
            raise CatalogError(f"{folder / folders[0]}: a folder; write it as one file")
        missing = [name for name in names if name not in present]
        if missing:
            found = name_files(present)
            raise CatalogError(f"{folder / missing[0]}: missing; the folder holds {found}, but {FORMATS}")
        return cls(tuple(folder / name for name in names), read)

    def fingerprint(self) -> str:
        """Hex digest of the names and bytes of the files."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as content:
                digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()

    def read(self, max_history: int) -> Interactions:
        """Check and read everything; a history keeps its last max_history items. Raises CatalogError."""
        return self._read(self.files, max_history)


def _read_splits(files: tuple[Path, ...], max_history: int) -> Interactions:
    index, titles = _read_items(files[0])
    splits = {}
    for name, file in zip(SPLITS, files[1:], strict=True):
        columns = Columns.of_parquet(file, "user_id", "history", "target", "timestamp")
        splits[name] = SplitTable(
            user_id=columns.texts("user_id"),
            history=index.lists(columns, "history").last(max_history),
            target=index.targets(columns, "target"),
            timestamp=columns.seconds("timestamp"),
        )
    return Interactions(index.ids, titles, splits)


def _read_sequences(files: tuple[Path, ...], max_history: int) -> Interactions:
    """Leave-last-out: a user's last item is a test target, the one before a validation target, the others train."""
    index, titles = _read_items(files[0])
    columns = Columns.of_parquet(files[1], "user_id", "item_ids")
    users, sequences = columns.texts("user_id"), index.lists(columns, "item_ids")
    row = np.repeat(np.arange(len(sequences)), sequences.lengths)
    position = np.arange(len(sequences.flat)) - sequences.start[row]
    targets, histories = sliding_histories(sequences.flat, sequences.lengths, max_history)
    behind = (sequences.lengths[row] - 1 - position)[targets]  # items that follow the target
    splits = {}
    for name, rows in zip(SPLITS, (behind >= 2, behind == 1, behind == 0), strict=True):
        chosen = np.flatnonzero(rows)
        if not len(chosen):
            raise CatalogError(
                f"{files[1]}: column 'item_ids': no sequence is long enough for the {name} split; a user's last item "
                "is kept for test and the one before for validation, so training needs 4 items of some user"
            )
        splits[name] = SplitTable(
            user_id=users.take(pa.array(row[targets[chosen]])),
            history=histories.take(chosen),
            target=sequences.flat[targets[chosen]],
            timestamp=position[targets[chosen]],
        )
    return Interactions(index.ids, titles, splits)


def _read_items(file: Path) -> tuple[ItemIndex, pa.LargeStringArray]:
    items = Columns.of_parquet(file, "item_id", "title")
    return ItemIndex(items, "item_id"), items.titles("title")


def _read_csv(files: tuple[Path, ...], max_history: int) -> Interactions:
    items = Columns(files[0], pa.table(dict(zip(("title", "item_id"), _info_lines(files[0]), strict=True))))
    index, titles = ItemIndex(items, "item_id"), items.titles("title")
    splits = {}
    for name, file in zip(SPLITS, files[1:], strict=True):
        columns = _csv_columns(file)
        target = index.targets(columns, "item_id")
        _check_same_titles(columns, titles.take(pa.array(target)), files[0].name)
        splits[name] = SplitTable(
            user_id=columns.texts("user_id"),
            history=index.lists(columns, "history_item_id").last(max_history),
            target=target,
            timestamp=columns.seconds("timestamp"),
        )
    return Interactions(index.ids, titles, splits)


def _info_lines(file: Path) -> tuple[list[str], list[int]]:
    """Titles and ids of ReRe's info file: one item per line, title, tab, id."""
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise CatalogError(f"{file}: not UTF-8 text ({error}); write it again as UTF-8") from error
    titles, item_ids = [], []
    for number, line in enumerate(lines, start=1):
        title, tab, item_id = line.rpartition("\t")
        if not tab or not item_id.strip().isdecimal() or len(item_id.strip()) > ITEM_DIGITS:
            raise CatalogError(
                f"{file}: line {number}: expected a title, a tab and the item's number (up to {ITEM_DIGITS} digits), "
                f"got {line!r}"
            )
        titles.append(title)
        item_ids.append(int(item_id))
    return titles, item_ids


def _csv_columns(file: Path) -> Columns:
    """A CSV file of ReRe's, its history_item_id column ("[3, 14]") made a column of lists."""
    texts = ("history_item_id", "item_title")
    columns = Columns.of_csv(file, "user_id", *texts, "item_id", "timestamp", texts=texts, ids=("user_id", "item_id"))
    lists = columns.column("history_item_id")
    wrong = pc.invert(pc.match_substring_regex(lists, r"^\[\s*(\d+(\s*,\s*\d+)*)?\s*\]$"))
    if pc.any(wrong).as_py():
        row = pc.index(wrong, True).as_py()
        raise columns.fault("history_item_id", row, f"expected a list such as [3, 14], got {lists[row].as_py()!r}")
    inner = pc.replace_substring_regex(lists, r"[\[\]\s]", "")
    split = pc.split_pattern(inner, ",")
    filled = pc.if_else(pc.equal(inner, ""), pa.scalar([], split.type), split)
    place = columns.table.column_names.index("history_item_id")
    try:
        numbers = filled.cast(pa.list_(pa.int64()))
    except pa.ArrowInvalid as error:
        raise CatalogError(
            f"{file}: column 'history_item_id' holds ids that are no 64-bit integers ({error})"
        ) from error
    return Columns(file, columns.table.set_column(place, "history_item_id", numbers), columns.names, columns.typed)


def _check_same_titles(columns: Columns, titles: pa.LargeStringArray, info: str) -> None:
    """The CSV repeats the target's title; where it differs from the info file's, the files do not belong together."""
    if "item_title" not in columns.table.column_names:
        return
    told = columns.column("item_title").cast(pa.large_string())
    differs = pc.not_equal(told, titles)
    if pc.any(differs).as_py():
        row = pc.index(differs, True).as_py()
        raise columns.fault(
            "item_title",
            row,
            f"{told[row].as_py()!r} is {titles[row].as_py()!r} in {info}; use the info file of the same data set",
        )
