"""The command line in tests: a command that must fail, and a small catalogue's folder."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.cli import main

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must fail; the single line of its error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        assert main(arguments) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a small valid catalogue."""
    folder = tmp_path / "data"
    folder.mkdir()
    items = {"item_id": list(range(40)), "title": [f"Acme Bolt M{i}, Steel" for i in range(40)]}
    pq.write_table(pa.table(items), folder / "items.parquet")
    for split, rows in (("train", 40), ("valid", 10), ("test", 10)):
        examples = {
            "user_id": [f"u{i}" for i in range(rows)],
            "history": [[i % 40, (i + 1) % 40] for i in range(rows)],
            "target": [(i + 2) % 40 for i in range(rows)],
            "timestamp": list(range(rows)),
        }
        pq.write_table(pa.table(examples), folder / f"{split}.parquet")
    return folder
