"""Preparing raw interactions, against loops that do what the paper says."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catalog.errors import CatalogError
from catalog.prepare import main, prepare
from catalog.source import Source

TITLES = ["Bolt", "Nut", None, "one two three four", "  ", "Wire"]
DAY = 86400


def write(folder: Path, log: list[tuple[str, int, int]]) -> tuple[Path, Path]:
    """log: (user, item, day)."""
    items = pa.table({"item_id": range(100, 100 + len(TITLES)), "title": TITLES})
    pq.write_table(items, folder / "raw-items.parquet")
    columns = {
        "user_id": pa.array([user for user, _, _ in log], pa.string()),
        "item_id": pa.array([100 + item for _, item, _ in log], pa.int64()),
        "timestamp": pa.array([day * DAY for _, _, day in log], pa.int64()),
    }
    pq.write_table(pa.table(columns), folder / "log.parquet")
    return folder / "log.parquet", folder / "raw-items.parquet"


def by_hand(log: list[tuple[str, int, int]], k: int, start: int, end: int, words: int, history: int) -> tuple:
    """(all examples in time order, ids of the items that are left), written as loops."""
    good = {i for i, title in enumerate(TITLES) if title and 0 < len(title.split()) <= words}
    log = [(user, item, day) for user, item, day in log if start <= day < end and item in good]
    while True:
        users, items = Counter(user for user, _, _ in log), Counter(item for _, item, _ in log)
        rest = [row for row in log if users[row[0]] >= k and items[row[1]] >= k]
        if len(rest) == len(log):
            break
        log = rest
    examples = []
    for user in dict.fromkeys(user for user, _, _ in log):
        mine = sorted((row for row in log if row[0] == user), key=lambda row: row[2])
        for at in range(1, len(mine)):
            before = [100 + item for _, item, _ in mine[max(0, at - history) : at]]
            examples.append((mine[at][2] * DAY, user, before, 100 + mine[at][1]))
    left = {100 + item for _, item, _ in log}
    return sorted(examples, key=lambda example: (example[0], example[1], len(example[2]))), left


LOGS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, len(TITLES)), st.integers(0, 12)), min_size=30, max_size=90
)


def test_csv_files_give_what_parquet_files_give(tmp_path: Path) -> None:
    titles = ['"Nut", the (1995)', "Père, L'", "1984", "千と千尋\nの", "Bolt, Box of 5"]
    items = pa.table({"item_id": range(100, 105), "title": titles, "genres": ["a|b"] * 5})
    rows = [(user, 100 + (user + place) % 5, 4.5, DAY * place) for user in range(8) for place in range(5)]
    log = pa.table(
        dict(zip(("user_id", "item_id", "rating", "timestamp"), map(list, zip(*rows, strict=True)), strict=True))
    )
    for name, table in (("items", items), ("log", log)):
        pq.write_table(table, tmp_path / f"{name}.csv.parquet")
        pa.csv.write_csv(table, tmp_path / f"{name}.CSV")
    assert prepare(tmp_path / "log.CSV", tmp_path / "items.CSV", tmp_path / "csv") == prepare(
        tmp_path / "log.csv.parquet", tmp_path / "items.csv.parquet", tmp_path / "parquet"
    )
    for name in ("items", "train", "valid", "test"):
        of_csv, of_parquet = (pq.read_table(tmp_path / kind / f"{name}.parquet") for kind in ("csv", "parquet"))
        assert of_csv.equals(of_parquet)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "lz4", "zst"])
def test_csv_files_may_be_compressed(tmp_path: Path, suffix: str) -> None:
    files = write_csv(tmp_path, ["ann", "bob", "cid"], ["1", "2", "3"])
    packed = [file.with_name(f"{file.name}.{suffix}") for file in files]
    for file, other in zip(files, packed, strict=True):
        with pa.output_stream(other) as stream:
            stream.write(file.read_bytes())
    assert prepare(*packed, tmp_path / "packed", k=3) == prepare(*files, tmp_path / "plain", k=3)
    packed[0].rename(files[0])
    with pytest.raises(CatalogError, match=r"log\.csv: not text in UTF-8"):
        prepare(*files, tmp_path / "out", k=3)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a,1,5|a,1,yesterday|b,2,7", r"column 'timestamp', row 1: 'yesterday' is not like the others"),
        ("a,1,2001-09-01|a,1,2001-09-02|b,2,7", r"column 'timestamp', row 2: '7' is not like the others"),
        ("a,1,2001-09-01|a,1,2001-13-02|b,2,2001-09-03", r"column 'timestamp', row 1: '2001-13-02' is not like"),
        ("a,1,5|a,1|b,2,7", r"Row #3: Expected 3 columns, got 2: a,1"),
        ('a,1,5|"a,1,6|' + "b,2,7|" * 99, r"not a readable CSV file \(.{0,203}\); write"),
        ("a,1,5|a,1,1700000000000|b,2,7", r"column 'timestamp', row 1: 1700000000000 looks like milliseconds"),
    ],
)
def test_a_fault_of_a_csv_file_is_located(tmp_path: Path, lines: str, message: str) -> None:
    log, items = write_csv(tmp_path, ["ann"], ["1"])
    log.write_text("user_id,item_id,timestamp\n" + lines.replace("|", "\n") + "\n")
    with pytest.raises(CatalogError, match=message):
        prepare(log, items, tmp_path / "out", k=1)


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    log, items = write_csv(tmp_path, ["ann"], ["1"])
    log.rename(tmp_path / "log.jsonl")
    with pytest.raises(CatalogError, match=r"log\.jsonl: its content is no Parquet, and its name does not"):
        prepare(tmp_path / "log.jsonl", items, tmp_path / "out")


def write_csv(folder: Path, users: list[str], items: list[str], time: str = "2001-09-{:02d}") -> tuple[Path, Path]:
    """Files in which every user has had every item, one a day."""
    log = [f"{user},{item},{time.format(day + 1)}" for user in users for day, item in enumerate(items)]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *log]))
    (folder / "items.csv").write_text("\n".join(["item_id,title", *(f"{item},Title {item}" for item in items)]))
    return folder / "log.csv", folder / "items.csv"


@pytest.mark.parametrize("names", [["007", "7", "12e5"], ["0001", "0002", "0003"], ["7", "8", "B01"]])
def test_ids_of_csv_files_stay_as_they_are_written(tmp_path: Path, names: list[str]) -> None:
    counts = prepare(*write_csv(tmp_path, names, names), tmp_path / "out", k=2)
    assert (counts["users"], counts["items"]) == (3, 3)
    assert sorted(pq.read_table(tmp_path / "out/items.parquet")["item_id"].to_pylist()) == sorted(names)
    rows = [
        row
        for split in ("train", "valid", "test")
        for row in pq.read_table(tmp_path / f"out/{split}.parquet").to_pylist()
    ]
    assert {row["user_id"] for row in rows} <= set(names)
    assert {row["timestamp"] % DAY for row in rows} == {0}


def test_numbers_of_a_csv_file_are_ids_of_a_catalogue_of_strings(tmp_path: Path) -> None:
    log, _ = write_csv(tmp_path, ["ann", "bob", "cid"], ["1", "2", "3"])
    (tmp_path / "items.csv").write_text("item_id,title\n1,Bolt\n2,Nut\n3,Wire\nB4,Washer\n")
    assert prepare(log, tmp_path / "items.csv", tmp_path / "out", k=3)["items"] == 3


def test_an_interaction_of_nobody_is_a_fault(tmp_path: Path) -> None:
    files = write_csv(tmp_path, ["ann", "", "cid"], ["1", "2", "3"])
    with pytest.raises(CatalogError, match=r"log\.csv: column 'user_id', row 3: empty"):
        prepare(*files, tmp_path / "out", k=3)


def prepared_csv(folder: Path, users: list[str], items: list[str], known: list[str]) -> Source:
    """From CSV files: every user with each of the items, once a day."""
    rows = [f"{user},{item},{DAY * day}" for day, item in enumerate(items) for user in users]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    (folder / "items.csv").write_text("\n".join(["item_id,title", *(f"{item},Title of {item}" for item in known)]))
    prepare(folder / "log.csv", folder / "items.csv", folder / "out", k=1)
    return Source.of(folder / "out")


@pytest.mark.parametrize(
    ("users", "items"),
    [
        (["7", "07", "007"], ["1", "01", "x"]),
        (["1e5", "2e5"], ["9223372036854775809", "9223372036854775810", "3"]),
        (["0", "-1"], ["5", "6", "12"]),
    ],
)
def test_ids_of_csv_files_are_what_is_written_there(tmp_path: Path, users: list[str], items: list[str]) -> None:
    read = prepared_csv(tmp_path, users, items * 3, items).read(10)
    assert set(map(str, read.item_ids.to_pylist())) == set(items)
    assert {user for split in read.splits.values() for user in split.user_id.to_pylist()} == set(users)


def test_one_csv_file_may_hold_other_ids_besides_numbers(tmp_path: Path) -> None:
    read = prepared_csv(tmp_path, ["a", "b"], ["5", "6"] * 4, ["5", "6", "B7"]).read(10)
    assert read.item_ids.to_pylist() == ["5", "6"]


def test_numbers_of_csv_files_are_integers_also_below_zero_and_between_blanks(tmp_path: Path) -> None:
    read = prepared_csv(tmp_path, ["a", "b"], ["5", "-6"] * 4, [" 5", "-6 "]).read(10)
    assert read.item_ids.to_pylist() == [5, -6]


@pytest.mark.parametrize(
    ("users", "items", "message"),
    [
        (["a", ""], ["x", "y"], "'user_id', row 1: empty"),
        (["1", "NA"], ["x", "y"], "'user_id', row 1: empty"),
        (["a", "b"], ["x", ""], "'item_id', row 2: empty"),
        (["1.0", "2.0"], ["x", "y"], "'user_id' is double"),
    ],
)
def test_ids_that_are_none_are_refused_in_csv_files(
    tmp_path: Path, users: list[str], items: list[str], message: str
) -> None:
    with pytest.raises(CatalogError, match=message):
        prepared_csv(tmp_path, users, items, ["x", "y"])


def test_ids_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"log\.csv: column 'item_id', row 0: neither item 'item-5' nor any other"):
        prepared_csv(tmp_path, ["a", "b"], ["item-5", "item-6"], ["5", "6"])


def test_a_title_of_any_white_space_is_left_out(tmp_path: Path) -> None:
    """So that the folder can be read; words end at any white space, too."""
    files = write(tmp_path, [(user, item, day) for day in range(8) for user in "abc" for item in (0, 1, 4, 5)])
    titles = ["Bolt", "Wing\u00a0Nut", None, "x", "\u3000\u00a0", "one\u00a0two\u3000three"]
    pq.write_table(pa.table({"item_id": range(100, 106), "title": titles}), files[1])
    prepare(*files, tmp_path / "out", k=3, max_title_words=2)
    assert Source.of(tmp_path / "out").read(10).titles.to_pylist() == titles[:2]


def test_repeated_interactions_are_kept_and_counted(tmp_path: Path) -> None:
    log = [
        (user, item, day) for user in "ab" for item, day in ((0, 0), (1, 1), (5, 2), (0, 3), (1, 4), (1, 4), (1, 4))
    ]
    counts = prepare(*write(tmp_path, log), tmp_path / "out", k=1)
    assert (counts["interactions_kept"], counts["of_them_repeated"]) == (14, 4)


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("as_csv", [False, True])
def test_interactions_within_a_second_are_in_their_order(tmp_path: Path, unit: str, as_csv: bool) -> None:
    log, items = write(tmp_path, [(user, item, 0) for user in "abcdef" for item in (5, 1, 0)])
    instants = pa.array([1_600_000_000_000 + 100 * place for _ in "abcdef" for place in (2, 1, 0)], pa.timestamp("ms"))
    table = pq.read_table(log).set_column(2, "timestamp", instants.cast(pa.timestamp(unit)))
    if as_csv:
        pa.csv.write_csv(table, log := tmp_path / "log.csv")
    else:
        pq.write_table(table, log)
    counts = prepare(log, items, tmp_path / "out", k=1)
    assert counts["of_them_repeated"] == 0
    examples = pa.concat_tables(
        pq.read_table(tmp_path / "out" / f"{name}.parquet") for name in ("train", "valid", "test")
    )
    assert {(*row["history"], row["target"]) for row in examples.to_pylist()} == {(100, 101), (100, 101, 105)}
    assert set(examples["timestamp"].to_pylist()) == {1_600_000_000}


@settings(suppress_health_check=[HealthCheck.filter_too_much], deadline=None)
@given(LOGS, st.integers(1, 4), st.integers(0, 3), st.integers(8, 13), st.integers(1, 4))
def test_prepared_examples_equal_the_loops(
    tmp_path_factory: pytest.TempPathFactory,
    log: list[tuple[str, int, int]],
    k: int,
    start: int,
    end: int,
    history: int,
) -> None:
    folder = tmp_path_factory.mktemp("prepare")
    expected, left = by_hand(log, k, start, end, 3, history)
    log_file, items_file = write(folder, log)
    days = {"start": f"1970-01-{start + 1:02d}", "end": f"1970-01-{end + 1:02d}"}
    if len(expected) < 10:
        return
    counts = prepare(log_file, items_file, folder / "out", k=k, max_title_words=3, max_history=history, **days)
    rows = []
    for split in ("train", "valid", "test"):
        table = pq.read_table(folder / "out" / f"{split}.parquet").to_pylist()
        assert len(table) == counts[split]
        rows += [(row["timestamp"], row["user_id"], row["history"], row["target"]) for row in table]
    assert [row[0] for row in rows] == [row[0] for row in expected]
    assert sorted(rows, key=lambda row: (row[0], row[1], len(row[2]))) == expected
    assert counts["train"] == int(len(rows) * 0.8)
    assert counts["train"] + counts["valid"] == int(len(rows) * 0.9)
    assert set(pq.read_table(folder / "out/items.parquet")["item_id"].to_pylist()) == left
    read = Source.of(folder / "out").read(10)
    targets = [read.item_ids[int(item)].as_py() for split in read.splits.values() for item in split.target]
    assert targets == [row[3] for row in rows]


@pytest.fixture
def west(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose days begin nine hours after those of UTC."""
    with monkeypatch.context() as there:
        there.setenv("TZ", "WEST+9")
        time.tzset()
        yield
    time.tzset()


def test_the_command_writes_a_folder_that_can_be_trained_on(
    west: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = [(user, item, day) for day in range(8) for user in "abc" for item in (0, 1)]
    files = write(tmp_path, log)
    assert main([*map(str, files), str(tmp_path / "new/out"), "--k", "3", "--end", "1970-01-08"]) == 0
    assert "interactions kept: 42" in capsys.readouterr().out
    assert len(Source.of(tmp_path / "new/out").read(10).splits["train"]) == int(39 * 0.8)


def test_titles_as_a_dictionary_are_the_same(tmp_path: Path) -> None:
    """As pandas writes a categorical column."""
    files = write(tmp_path, [(user, item, day) for day in range(8) for user in "abc" for item in (0, 1)])
    plain = prepare(*files, tmp_path / "plain", k=3)
    items = pq.read_table(files[1])
    pq.write_table(items.set_column(1, "title", items["title"].dictionary_encode()), files[1])
    assert prepare(*files, tmp_path / "encoded", k=3) == plain
    written = [pq.read_table(tmp_path / name / "items.parquet") for name in ("plain", "encoded")]
    assert written[0].equals(written[1])


def test_faults_are_named(tmp_path: Path) -> None:
    files = write(tmp_path, [("a", 0, 1), ("a", 1, 2), ("b", 0, 3)])
    with pytest.raises(CatalogError, match=r"nothing is left of 3 .* are 3; of these 3 have .* is left where .* k=5"):
        prepare(*files, tmp_path / "out")
    with pytest.raises(CatalogError, match=r"from 1970-01-02 to 1970-01-04\. Within .* are 1; of these 1 have"):
        prepare(*files, tmp_path / "out", start="1970-01-04")
    with pytest.raises(CatalogError, match=r"are 3; of these 0 have .* max_title_words=0"):
        prepare(*files, tmp_path / "out", max_title_words=0)
    with pytest.raises(CatalogError, match="too few for a train split"):
        prepare(*files, tmp_path / "out", k=1)
    with pytest.raises(CatalogError, match="'November' is no day"):
        prepare(*files, tmp_path / "out", start="November")
    with pytest.raises(CatalogError, match="start=2001-01-01 is not before end=2000-01-01"):
        prepare(*files, tmp_path / "out", start="2001-01-01", end="2000-01-01")
    with pytest.raises(CatalogError, match="k=0: give 1 or more"):
        prepare(*files, tmp_path / "out", k=0)
    with pytest.raises(CatalogError, match="max_history=0: a prompt needs at least one item"):
        prepare(*files, tmp_path / "out", max_history=0)
    with pytest.raises(CatalogError, match="exists"):
        prepare(*files, tmp_path)
    with pytest.raises(CatalogError, match=r"nowhere\.parquet: missing"):
        prepare(tmp_path / "nowhere.parquet", files[1], tmp_path / "out")
    with pytest.raises(CatalogError, match=r"log\.parquet: missing; there is no folder .*nowhere"):
        prepare(tmp_path / "nowhere" / "log.parquet", files[1], tmp_path / "out")
    for number in range(30):
        (tmp_path / f"a{number:02}").touch()
    with pytest.raises(CatalogError, match=r"nowhere\.parquet: missing; the folder holds a00, [a0-9, ]* and 22 more$"):
        prepare(tmp_path / "nowhere.parquet", files[1], tmp_path / "out")
    with pytest.raises(CatalogError, match=r"/dev/null: not a regular file; write it as one"):
        prepare(Path("/dev/null"), files[1], tmp_path / "out")
    (tmp_path / "parts.parquet").mkdir()
    with pytest.raises(CatalogError, match=r"parts\.parquet: a folder; write it as one file"):
        prepare(tmp_path / "parts.parquet", files[1], tmp_path / "out")
    pq.write_table(pa.table([[1], [2], ["Bolt"]], names=["item_id", "item_id", "title"]), files[1])
    with pytest.raises(CatalogError, match=r"raw-items\.parquet: column 'item_id' occurs twice"):
        prepare(*files, tmp_path / "out")
    pq.write_table(pa.table({"item_id": [1], "name": ["Bolt"]}), files[1])
    with pytest.raises(CatalogError, match="'title' is missing"):
        prepare(*files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_made_meanwhile_is_not_taken_for_the_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(tmp_path, [(user, item, day) for day in range(8) for user in "abc" for item in (0, 1)])
    write_table = pq.write_table

    def write_while_another_does(table: pa.Table, file: Path) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").touch()
        write_table(table, file)

    monkeypatch.setattr(pq, "write_table", write_while_another_does)
    with pytest.raises(CatalogError, match="out: exists"):
        prepare(*files, tmp_path / "out", k=3)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert not list(tmp_path.glob(".out*"))
