"""Columns of a user's tables, checked: every fault names the file, the column, the row, the value and the remedy."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from catalog.errors import CatalogError, name_files
from catalog.ragged import Ragged

UNITS = {10**17: "nanoseconds", 10**14: "microseconds", 10**11: "milliseconds"}
"""What a time from this number on is likely to count: in seconds the smallest of them would lie in the year 5138."""
CSV_NULLS = pa.array(pa.csv.ConvertOptions().null_values)
"""How CSV files spell a number that is missing."""


class Columns:
    """A table of the user's with its file name. Rows are counted from 0.

    >>> columns = Columns.of_parquet(folder / "train.parquet", "user_id", "history")
    >>> columns.texts("user_id"); columns.id_lists("history")
    """

    def __init__(self, file: Path, table: pa.Table, names: Sequence[str] = (), typed: bool = True) -> None:
        """names: all columns of the file, where `table` holds some of them only. typed: False for text files."""
        self.file = file
        self.table = table
        self.names = names or table.column_names
        self.typed = typed
        if not table.num_rows:
            raise CatalogError(f"{file}: no rows; every file needs at least one")

    @classmethod
    def of_parquet(cls, file: Path, *names: str) -> "Columns":
        """The columns `names`; others are not read. Raises CatalogError for a file that is missing or no Parquet."""
        _check_exists(file)
        try:
            present = pq.read_schema(file).names
            _check_once(file, present, names)
            table = pq.read_table(file, columns=[name for name in names if name in present])
            table.validate(full=True)
        except (OSError, pa.ArrowException) as error:
            raise CatalogError(f"{file}: not a readable Parquet file ({error}); write it again") from error
        return cls(file, table, present)

    @classmethod
    def of_csv(cls, file: Path, *names: str, texts: Sequence[str] = (), ids: Sequence[str] = ()) -> "Columns":
        """The same of a CSV file in UTF-8 with a header, compressed where its name ends in .gz, .bz2 or the like.

        texts: columns of strings, also where all are numbers. ids: columns of ids, as _csv_ids reads them.
        """
        _check_exists(file)
        if file.suffix.lower() == ".csv" and _is_binary(file):
            raise CatalogError(
                f"{file}: not text in UTF-8; write it so, or, if it is compressed, name it .csv.gz or the like"
            )
        kinds = dict.fromkeys([*texts, *ids], pa.string())
        try:
            table = _read_csv(file, kinds)
        except (OSError, pa.ArrowException) as error:
            told = " ".join(str(error).split())
            raise CatalogError(
                f"{file}: not a readable CSV file ({told[:200]}{'...' if len(told) > 200 else ''}); write it as UTF-8 "
                "text with a header, commas, and as many values in every row"
            ) from error
        present = table.column_names
        _check_once(file, present, names)
        table = table.select([name for name in names if name in present])
        for place, name in enumerate(table.column_names):
            if name in ids:
                table = table.set_column(place, name, _csv_ids(table[name]))
        return cls(file, table, present, typed=False)

    def fault(self, column: str, row: int, message: str) -> CatalogError:
        return CatalogError(f"{self.file}: column {column!r}, row {row}: {message}")

    def with_nulls(self, name: str) -> pa.Array:
        """The column in one piece. Raises CatalogError where it is missing."""
        if name not in self.table.column_names:
            raise CatalogError(f"{self.file}: column {name!r} is missing; the file has {', '.join(self.names)}")
        column = self.table[name].combine_chunks()
        return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column

    def column(self, name: str) -> pa.Array:
        """The column in one piece. Raises CatalogError where it is missing or has a null."""
        column = self.with_nulls(name)
        if column.null_count:
            raise self.fault(name, _first(column.is_null()), "empty (null); fill it in or drop the row")
        return column

    def ids(self, name: str) -> pa.Array:
        """A column of ids: int64 or large_string, as the file has it."""
        return self._as_ids(name, self.column(name), "integers or strings")

    def texts(self, name: str) -> pa.LargeStringArray:
        """A column of strings; integers are taken as their digits, as user ids often are."""
        return self.ids(name).cast(pa.large_string())

    def titles(self, name: str) -> pa.LargeStringArray:
        """A column of strings that are not blank."""
        column = self._as_strings(name, self.column(name))
        blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)
        if pc.any(blank).as_py():
            row = _first(blank)
            raise self.fault(
                name, row, f"the title {column[row].as_py()!r} is empty; give the item a title or drop it everywhere"
            )
        return column

    def titles_with_nulls(self, name: str) -> pa.LargeStringArray:
        """A column of strings that may be blank or null."""
        return self._as_strings(name, self.with_nulls(name))

    def seconds(self, name: str) -> np.ndarray:
        """int64 [n]: seconds since 1970, from integers or from Arrow timestamps or dates."""
        column = self.column(name)
        if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            return column.cast(pa.timestamp("s"), safe=False).cast(pa.int64()).to_numpy()
        if not self.typed and _is_text(column.type):
            row = _first_no_time(column)
            raise self.fault(
                name,
                row,
                f"{column[row].as_py()!r} is not like the others: expected seconds since 1970, or days or ISO 8601",
            )
        if not pa.types.is_integer(column.type):
            raise CatalogError(
                f"{self.file}: column {name!r} is {column.type}, expected integers (seconds since 1970) or timestamps"
            )
        try:
            seconds = column.cast(pa.int64()).to_numpy()
        except pa.ArrowInvalid as error:
            raise CatalogError(
                f"{self.file}: column {name!r} holds times above 2^63 - 1 ({error}); write seconds since 1970"
            ) from error
        for least, unit in UNITS.items():
            if seconds.max() >= least:
                row = int((seconds >= least).argmax())
                raise self.fault(
                    name,
                    row,
                    f"{seconds[row]} looks like {unit}: expected seconds since 1970; convert them, or write an Arrow "
                    "timestamp column",
                )
        return seconds

    def instants(self, name: str) -> np.ndarray:
        """int64 [n]: the times that `seconds` takes, in the column's own unit, which is what orders them."""
        column = self.column(name)
        return column.cast(pa.int64()).to_numpy() if pa.types.is_timestamp(column.type) else self.seconds(name)

    def id_lists(self, name: str) -> tuple[pa.Array, np.ndarray]:
        """A column of lists of ids: (all ids one behind the other, length of each list); no list is empty."""
        column = self.column(name)
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise CatalogError(f"{self.file}: column {name!r} is {column.type}, expected lists of item ids")
        lengths = column.value_lengths().to_numpy().astype(np.int64)
        if not lengths.all():
            row = int(np.argmin(lengths))
            raise self.fault(name, row, "an empty list; a prompt needs at least one item, so drop the row")
        values = column.flatten()
        if values.null_count:
            row = int(np.searchsorted(np.cumsum(lengths), _first(values.is_null()), side="right"))
            raise self.fault(name, row, f"an empty entry (null) in {column[row].as_py()}; remove it from the list")
        return self._as_ids(name, values, "lists of integers or strings"), lengths

    def _as_strings(self, name: str, column: pa.Array) -> pa.LargeStringArray:
        if not _is_text(column.type):
            raise CatalogError(f"{self.file}: column {name!r} is {column.type}, expected strings")
        return column.cast(pa.large_string())

    def _as_ids(self, name: str, values: pa.Array, expected: str) -> pa.Array:
        if pa.types.is_integer(values.type):
            try:
                return values.cast(pa.int64())
            except pa.ArrowInvalid as error:
                raise CatalogError(
                    f"{self.file}: column {name!r} holds ids above 2^63 - 1 ({error}); write them as strings"
                ) from error
        if _is_text(values.type):
            return values.cast(pa.large_string())
        raise CatalogError(f"{self.file}: column {name!r} is {self.table[name].type}, expected {expected}")


class ItemIndex:
    """The items of a catalogue by their id; an item is its row."""

    def __init__(self, items: Columns, id_column: str) -> None:
        self.file, self._typed = items.file, items.typed
        self.ids = items.ids(id_column)
        first = pc.index_in(self.ids, self.ids).to_numpy()
        again = np.flatnonzero(first != np.arange(len(first)))
        if len(again):
            row = int(again[0])
            raise items.fault(
                id_column, row, f"id {self.ids[row].as_py()!r} is also in row {first[row]}; give every item its own id"
            )

    def targets(self, columns: Columns, name: str) -> np.ndarray:
        """int32 [n]: the items of a column of ids."""
        ids = columns.ids(name)
        return self._find(columns, name, ids, np.ones(len(ids), np.int64))

    def lists(self, columns: Columns, name: str) -> Ragged:
        """The items of a column of lists of ids."""
        ids, lengths = columns.id_lists(name)
        return Ragged.from_lengths(self._find(columns, name, ids, lengths), lengths)

    def known(self, columns: Columns, name: str) -> np.ndarray:
        """int32 [n]: the items of a column of ids, -1 for those that are no item here."""
        return self._lookup(columns, name, columns.ids(name)).fill_null(-1).to_numpy()

    def _lookup(self, columns: Columns, name: str, ids: pa.Array) -> pa.Int32Array:
        if ids.type != self.ids.type and not (columns.typed and self._typed):
            return pc.index_in(ids.cast(pa.large_string()), self.ids.cast(pa.large_string()))
        if ids.type != self.ids.type:
            kinds = {pa.int64(): "integers"}
            raise CatalogError(
                f"{columns.file}: column {name!r} holds {kinds.get(ids.type, 'strings')}, but the ids in "
                f"{self.file.name} are {kinds.get(self.ids.type, 'strings')}; write both in the same type"
            )
        return pc.index_in(ids, self.ids)

    def _find(self, columns: Columns, name: str, ids: pa.Array, lengths: np.ndarray) -> np.ndarray:
        items = self._lookup(columns, name, ids)
        if items.null_count:
            at = _first(items.is_null())
            row = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
            raise columns.fault(
                name, row, f"item {ids[at].as_py()!r} is not in {self.file.name}; add the item or drop the row"
            )
        return items.to_numpy()


def _check_exists(file: Path) -> None:
    if file.is_file():
        return
    if file.is_dir():
        raise CatalogError(f"{file}: a folder; write it as one file")
    if file.exists():
        raise CatalogError(f"{file}: not a regular file; write it as one")
    if not file.parent.is_dir():
        raise CatalogError(f"{file}: missing; there is no folder {file.parent}")
    beside = (path.name for path in file.parent.iterdir())
    raise CatalogError(f"{file}: missing; the folder holds {name_files(beside)}")


def _check_once(file: Path, present: Sequence[str], names: Sequence[str]) -> None:
    twice = [name for name in names if present.count(name) > 1]
    if twice:
        raise CatalogError(f"{file}: column {twice[0]!r} occurs twice; keep one of them")


def _read_csv(file: Path, kinds: dict[str, pa.DataType]) -> pa.Table:
    """A CSV file with columns of given kinds. Raises what Arrow says of it, with the number of the row."""
    parsing = pa.csv.ParseOptions(newlines_in_values=True)
    conversion = pa.csv.ConvertOptions(column_types=kinds)
    try:
        return pa.csv.read_csv(file, parse_options=parsing, convert_options=conversion)
    except pa.ArrowException:  # by one thread, Arrow knows the row
        reading = pa.csv.ReadOptions(use_threads=False)
        return pa.csv.read_csv(file, read_options=reading, parse_options=parsing, convert_options=conversion)


def _is_binary(file: Path) -> bool:
    with file.open("rb") as content:
        start = content.read(1024)
    return b"\0" in start or start.startswith(b"\x1f\x8b")  # which a short gzip file may do without


def _first_no_time(texts: pa.Array) -> int:
    """The first row that is no number where most are, or else no day or time."""
    number = pc.match_substring_regex(texts, r"^-?\d+$")
    if 2 * (pc.sum(number).as_py() or 0) > len(texts):
        return max(0, _first(pc.invert(number)))
    for row, text in enumerate(texts):
        try:
            text.cast(pa.timestamp("us"))
        except pa.ArrowInvalid:
            return row
    return 0


def _csv_ids(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Integers where these, written again, are what the file says (007 is not 7); else texts, or decimal numbers."""
    trimmed = pc.utf8_trim_whitespace(texts)
    known = pc.if_else(pc.is_in(trimmed, CSV_NULLS), None, trimmed)
    if pc.all(pc.match_substring_regex(known, r"^(0|-?[1-9]\d{0,17})$")).as_py():
        return known.cast(pa.int64())
    if pc.all(pc.match_substring_regex(known, r"^-?\d+\.\d*$")).as_py():
        return known.cast(pa.float64())
    return pc.if_else(pc.equal(trimmed, ""), None, texts)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _first(flags: pa.BooleanArray) -> int:
    return int(pc.index(flags, True).as_py())
