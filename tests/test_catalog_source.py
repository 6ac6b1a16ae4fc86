"""Reading a user's folder: three formats, and an early error that names file, column, row and value for each fault."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catalog.errors import CatalogError
from catalog.interactions import Interactions
from catalog.source import Source

ITEMS: dict[str, list] = {"item_id": [10, 20, 30], "title": ["Bolt", "Nut", "Bolt"]}
EXAMPLES: dict[str, list] = {
    "user_id": ["a", "b"],
    "history": [[10], [20, 10]],
    "target": [20, 30],
    "timestamp": [100, 200],
}


def write(path: Path, columns: dict[str, Any]) -> None:
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder of the first format."""
    write(tmp_path / "items.parquet", ITEMS)
    for split in ("train", "valid", "test"):
        write(tmp_path / f"{split}.parquet", EXAMPLES)
    return tmp_path


def read(folder: Path, max_history: int = 10) -> Interactions:
    return Source.of(folder).read(max_history)


def lists(data: Interactions, split: str) -> list[list[int]]:
    history = data.splits[split].history
    return [history[i].tolist() for i in range(len(history))]


def test_items_become_rows_of_the_item_table(folder: Path) -> None:
    data = read(folder)
    assert data.titles.to_pylist() == ["Bolt", "Nut", "Bolt"]
    assert data.item_ids.to_pylist() == [10, 20, 30]
    assert lists(data, "train") == [[0], [1, 0]]
    assert data.splits["train"].target.tolist() == [1, 2]
    assert data.splits["train"].user_id.to_pylist() == ["a", "b"]
    assert data.splits["train"].timestamp.tolist() == [100, 200]


def test_other_columns_are_not_read(folder: Path) -> None:
    broken = pa.array([b"\xff\xfe"] * 2).view(pa.string())
    write(folder / "train.parquet", EXAMPLES | {"description": broken})
    assert lists(read(folder), "train") == [[0], [1, 0]]


def test_histories_keep_their_last_items(folder: Path) -> None:
    assert lists(read(folder, max_history=1), "test") == [[0], [0]]


@pytest.mark.parametrize(
    ("items", "examples"),
    [
        ({"item_id": ["x", "y", "z"]}, {"history": [["x"], ["y", "x"]], "target": ["y", "z"]}),
        ({}, {"user_id": [7, 8]}),
        ({}, {"timestamp": pa.array([100, 200], pa.timestamp("s")).cast(pa.timestamp("ns"))}),
        ({}, {"timestamp": pa.array([100_999, 200_001], pa.timestamp("ms"))}),
        ({}, {"history": pa.array(EXAMPLES["history"], pa.large_list(pa.int16()))}),
        ({"title": pa.array(ITEMS["title"], pa.string_view())}, {"user_id": pa.array(["a", "b"], pa.string_view())}),
        ({"title": pa.array(ITEMS["title"]).dictionary_encode()}, {"target": pa.array([20, 30], pa.uint32())}),
    ],
)
def test_ids_times_and_lists_of_other_widths_are_the_same(folder: Path, items: dict, examples: dict) -> None:
    write(folder / "items.parquet", ITEMS | items)
    for split in ("train", "valid", "test"):
        write(folder / f"{split}.parquet", EXAMPLES | examples)
    data = read(folder)
    assert lists(data, "valid") == [[0], [1, 0]]
    assert data.splits["valid"].target.tolist() == [1, 2]
    assert data.splits["valid"].timestamp.tolist() == [100, 200]
    assert data.splits["valid"].user_id.to_pylist() == [str(user) for user in examples.get("user_id", ["a", "b"])]


@pytest.mark.parametrize(("unit", "digits"), [("milliseconds", 3), ("microseconds", 6), ("nanoseconds", 9)])
def test_other_units_are_not_taken_for_seconds(folder: Path, unit: str, digits: int) -> None:
    write(folder / "train.parquet", EXAMPLES | {"timestamp": [1_700_000_000 * 10**digits, 5]})
    with pytest.raises(CatalogError, match=rf"train\.parquet: column 'timestamp', row 0: 17000000000.* like {unit}"):
        read(folder)


def test_a_time_is_in_seconds_up_to_the_year_5138(folder: Path) -> None:
    write(folder / "train.parquet", EXAMPLES | {"timestamp": [5, 10**11 - 1]})
    assert read(folder).splits["train"].timestamp.tolist() == [5, 10**11 - 1]
    write(folder / "train.parquet", EXAMPLES | {"timestamp": [5, 10**11]})
    with pytest.raises(CatalogError, match="like milliseconds"):
        read(folder)


def test_sequences_leave_the_last_two_items_out(tmp_path: Path) -> None:
    write(tmp_path / "items.parquet", {"item_id": [0, 1, 2, 3, 4], "title": list("abcde")})
    write(tmp_path / "sequences.parquet", {"user_id": ["u", "v", "w"], "item_ids": [[4, 3, 2, 1, 0], [1], [2, 3]]})
    data = read(tmp_path, max_history=2)
    assert (lists(data, "train"), data.splits["train"].target.tolist()) == ([[4], [4, 3]], [3, 2])
    assert (lists(data, "valid"), data.splits["valid"].target.tolist()) == ([[3, 2]], [1])
    assert (lists(data, "test"), data.splits["test"].target.tolist()) == ([[2, 1], [2]], [0, 3])
    assert data.splits["test"].user_id.to_pylist() == ["u", "w"]
    assert data.splits["test"].timestamp.tolist() == [4, 1]


def test_too_short_sequences_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "items.parquet", ITEMS)
    write(tmp_path / "sequences.parquet", {"user_id": ["u"], "item_ids": [[10, 20, 30]]})
    with pytest.raises(CatalogError, match=r"sequences\.parquet.*'item_ids'.*train split"):
        read(tmp_path)


def write_csv(folder: Path, **changes: str) -> None:
    (folder / "info.txt").write_text('Bolt, 3"\t0\nTab\there\t1\n')
    row = {
        "user_id": "u",
        "history_item_id": "[1, 0]",
        "item_id": "0",
        "item_title": 'Bolt, 3"',
        "timestamp": "100",
    } | changes
    for split in ("train", "valid", "test"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)


def test_published_csv_files_are_read(tmp_path: Path) -> None:
    write_csv(tmp_path)
    data = read(tmp_path)
    assert data.titles.to_pylist() == ['Bolt, 3"', "Tab\there"]
    assert lists(data, "train") == [[1, 0]]
    assert lists(read(tmp_path, max_history=1), "train") == [[0]]
    assert data.splits["train"].target.tolist() == [0]


def test_of_several_formats_the_one_with_given_splits_in_parquet_is_read(folder: Path) -> None:
    write_csv(folder)
    write(folder / "sequences.parquet", {"user_id": ["u"], "item_ids": [[10, 20, 30, 10, 20]]})
    assert lists(read(folder), "train") == [[0], [1, 0]]


def test_titles_and_users_of_digits_keep_their_zeros(tmp_path: Path) -> None:
    write_csv(tmp_path, user_id="0042", item_title="007")
    (tmp_path / "info.txt").write_text("007\t0 \n008\t 1\n")
    data = read(tmp_path)
    assert data.titles.to_pylist() == ["007", "008"]
    assert data.splits["train"].user_id.to_pylist() == ["0042"]


def test_lines_may_break_within_a_value_of_a_large_csv_file(tmp_path: Path) -> None:
    write_csv(tmp_path, note="a line,\n" * 20)
    header, row = (tmp_path / "train.csv").read_text().split("\n", 1)
    (tmp_path / "train.csv").write_text(f"{header}\n" + row * 20_000)
    assert len(read(tmp_path).splits["train"]) == 20_000


def test_a_byte_order_mark_belongs_to_no_title(tmp_path: Path) -> None:
    write_csv(tmp_path)
    (tmp_path / "info.txt").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "info.txt").read_bytes())
    assert read(tmp_path).titles.to_pylist() == ['Bolt, 3"', "Tab\there"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"history_item_id": "[1, x]"}, ["train.csv", "'history_item_id'", "row 0", "[1, x]"]),
        ({"history_item_id": "[1,,0]"}, ["train.csv", "'history_item_id'", "row 0", "[1,,0]"]),
        ({"history_item_id": "[]"}, ["train.csv", "'history_item_id'", "row 0", "empty list"]),
        ({"history_item_id": "[5]"}, ["train.csv", "'history_item_id'", "row 0", "item 5 is not in info.txt"]),
        ({"item_title": "Screw"}, ["train.csv", "'item_title'", "row 0", "'Screw'", "info.txt"]),
        ({"history_item_id": "[99999999999999999999]"}, ["train.csv", "'history_item_id'", "64-bit"]),
        ({"item_id": "nine"}, ["train.csv", "'item_id'", "row 0", "'nine' is not in info.txt"]),
        ({"timestamp": "yesterday"}, ["train.csv", "'timestamp'", "row 0", "'yesterday'", "seconds since 1970"]),
        ({"timestamp": "18446744073709551615"}, ["train.csv", "'timestamp'"]),
    ],
)
def test_faults_of_csv_files_are_named(tmp_path: Path, changes: dict, words: list[str]) -> None:
    write_csv(tmp_path, **changes)
    with pytest.raises(CatalogError) as error:
        read(tmp_path)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_csv_file_of_uneven_rows_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path)
    with (tmp_path / "valid.csv").open("a") as file:
        file.write("u,[0]\n")
    with pytest.raises(CatalogError, match=r"valid\.csv: not a readable CSV file .*; write it as UTF-8 text"):
        read(tmp_path)


def test_a_line_of_the_info_file_without_a_number_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path)
    (tmp_path / "info.txt").write_text("Bolt\t0\nNut 1\n")
    with pytest.raises(CatalogError, match=r"info\.txt: line 2: .*'Nut 1'"):
        read(tmp_path)


def test_a_number_of_the_info_file_that_fits_no_integer_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path, item_id="9" * 18, history_item_id="[0]", item_title="Nut")
    (tmp_path / "info.txt").write_text(f"Bolt\t0\nNut\t{'9' * 18}\n")
    assert read(tmp_path).item_ids.to_pylist() == [0, 10**18 - 1]
    (tmp_path / "info.txt").write_text("Bolt\t0\nNut\t99999999999999999999\n")
    with pytest.raises(CatalogError, match=r"info\.txt: line 2: .*up to 18 digits.*99999999999999999999"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("item_title", "timestamp", "column 'timestamp' occurs twice"),
        ("timestamp", "time", "column 'timestamp' is missing; the file has user_id, .*, item_title, time$"),
    ],
)
def test_a_wrong_header_of_a_csv_file_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_csv(tmp_path)
    (tmp_path / "train.csv").write_text((tmp_path / "train.csv").read_text().replace(old, new, 1))
    with pytest.raises(CatalogError, match=rf"train\.csv: {message}"):
        read(tmp_path)


def without(columns: dict[str, list], name: str) -> dict[str, list]:
    return {key: values for key, values in columns.items() if key != name}


FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no folder": (
        lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(),
        ["no such folder", "items.parquet", "`rere prepare`"],
    ),
    "no items": (lambda f: (f / "items.parquet").unlink(), ["items.parquet: missing", "holds test.parquet"]),
    "no split": (lambda f: (f / "valid.parquet").unlink(), ["valid.parquet: missing"]),
    "no Parquet": (lambda f: (f / "train.parquet").write_text("hello"), ["train.parquet", "not a readable Parquet"]),
    "a folder of parts": (
        lambda f: ((f / "train.parquet").unlink(), (f / "train.parquet").mkdir()),
        ["train.parquet: a folder", "one file"],
    ),
    "no column at all": (
        lambda f: write(f / "train.parquet", {"other": [1, 2]}),
        ["train.parquet", "'user_id' is missing", "the file has other"],
    ),
    "no column": (
        lambda f: write(f / "train.parquet", without(EXAMPLES, "target")),
        ["train.parquet", "'target' is missing", "user_id, history, timestamp"],
    ),
    "no title column": (
        lambda f: write(f / "items.parquet", without(ITEMS, "title")),
        ["items.parquet", "'title' is missing"],
    ),
    "text that is no UTF-8": (
        lambda f: pq.write_table(
            pa.table(EXAMPLES | {"user_id": pa.array([b"\xff\xfe"] * len(EXAMPLES["user_id"])).view(pa.string())}),
            f / "train.parquet",
        ),
        ["train.parquet", "not a readable Parquet"],
    ),
    "times beyond 64 bits": (
        lambda f: write(f / "train.parquet", EXAMPLES | {"timestamp": pa.array([2**63, 1], pa.uint64())}),
        ["train.parquet", "'timestamp'", "2^63"],
    ),
    "ids beyond 64 bits": (
        lambda f: write(f / "items.parquet", ITEMS | {"item_id": pa.array([2**63, 20, 30], pa.uint64())}),
        ["items.parquet", "'item_id'", "2^63"],
    ),
    "empty split": (
        lambda f: pq.write_table(pq.read_table(f / "test.parquet").slice(0, 0), f / "test.parquet"),
        ["test.parquet", "no rows"],
    ),
    "history of text": (
        lambda f: write(f / "train.parquet", EXAMPLES | {"history": ["[10]", "[20]"]}),
        ["train.parquet", "'history' is string", "lists of item ids"],
    ),
    "history of floats": (
        lambda f: write(f / "train.parquet", EXAMPLES | {"history": [[1.0], [2.0]]}),
        ["train.parquet", "'history' is list", "double", "integers or strings"],
    ),
    "target of floats": (
        lambda f: write(f / "valid.parquet", EXAMPLES | {"target": [1.0, 2.0]}),
        ["valid.parquet", "'target' is double"],
    ),
    "title of numbers": (
        lambda f: write(f / "items.parquet", ITEMS | {"title": [1, 2, 3]}),
        ["items.parquet", "'title' is int64", "expected strings"],
    ),
    "time as text": (
        lambda f: write(f / "train.parquet", EXAMPLES | {"timestamp": ["2018", "2019"]}),
        ["train.parquet", "'timestamp' is string", "seconds since 1970"],
    ),
    "blank title": (
        lambda f: write(f / "items.parquet", ITEMS | {"title": ["Bolt", " \t", "Nut"]}),
        ["items.parquet", "'title', row 1", "empty"],
    ),
    "null title": (
        lambda f: write(f / "items.parquet", ITEMS | {"title": ["Bolt", "Nut", None]}),
        ["items.parquet", "'title', row 2", "null"],
    ),
    "null user": (
        lambda f: write(f / "test.parquet", EXAMPLES | {"user_id": ["a", None]}),
        ["test.parquet", "'user_id', row 1", "null"],
    ),
    "null history": (
        lambda f: write(f / "test.parquet", EXAMPLES | {"history": [[10], None]}),
        ["test.parquet", "'history', row 1", "null"],
    ),
    "null in a history": (
        lambda f: write(f / "test.parquet", EXAMPLES | {"history": [[10, 20], [None, 20]]}),
        ["test.parquet", "'history', row 1", "null", "[None, 20]"],
    ),
    "empty history": (
        lambda f: write(f / "train.parquet", EXAMPLES | {"history": [[10], []]}),
        ["train.parquet", "'history', row 1", "empty list", "drop the row"],
    ),
    "unknown item": (
        lambda f: write(f / "train.parquet", EXAMPLES | {"history": [[10, 20, 30], [20, 999]]}),
        ["train.parquet", "'history', row 1", "item 999 is not in items.parquet"],
    ),
    "unknown target": (
        lambda f: write(f / "valid.parquet", EXAMPLES | {"target": [20, -1]}),
        ["valid.parquet", "'target', row 1", "item -1 is not in items.parquet"],
    ),
    "ids of two types": (
        lambda f: write(f / "train.parquet", EXAMPLES | {"target": ["20", "30"]}),
        ["train.parquet", "'target' holds strings", "items.parquet are integers"],
    ),
    "duplicate id": (
        lambda f: write(f / "items.parquet", ITEMS | {"item_id": [10, 10, 10]}),
        ["items.parquet", "'item_id', row 1", "id 10 is also in row 0"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(folder: Path, fault: str) -> None:
    break_it, words = FAULTS[fault]
    break_it(folder)
    with pytest.raises(CatalogError) as error:
        read(folder)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_link_that_leads_nowhere_is_a_missing_file(folder: Path) -> None:
    (folder / "train.parquet").unlink()
    (folder / "train.parquet").symlink_to(folder / "gone.parquet")
    with pytest.raises(CatalogError, match=r"train\.parquet: missing; the folder holds items\.parquet"):
        Source.of(folder)


def test_a_folder_of_many_files_is_not_listed_in_whole(folder: Path) -> None:
    (folder / "train.parquet").unlink()
    for number in range(30):
        (folder / f"a{number:02}").touch()
    with pytest.raises(CatalogError, match=r"folder holds a00, [a0-9, ]*, a09 and 23 more, but"):
        Source.of(folder)


def test_fingerprint_is_of_the_contents(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = Source.of(folder).fingerprint()
    moved = tmp_path_factory.mktemp("moved")
    for path in folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert Source.of(moved).fingerprint() == before
    write(moved / "test.parquet", EXAMPLES | {"timestamp": [100, 201]})
    assert Source.of(moved).fingerprint() != before


def test_real_folders_are_read(shared_dir: Path) -> None:
    industrial = read(shared_dir / "data/industrial")
    assert {name: len(split) for name, split in industrial.splits.items()} == {
        "train": 10393,
        "valid": 4532,
        "test": 4533,
    }
    table = pq.read_table(shared_dir / "data/industrial/test.parquet")
    np.testing.assert_array_equal(industrial.splits["test"].target, table["target"].to_numpy())
    toys = read(shared_dir / "data/toys")
    assert len(toys.splits["test"]) == 19412
    with pytest.raises(CatalogError, match=r"train\.csv: missing"):
        read(shared_dir / "data/industrial_csv")
