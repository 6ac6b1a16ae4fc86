"""The command line as a user meets it: bad input ends at once with one line that says what to do."""

import json
import shutil
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


def test_a_missing_file_is_named(data: Path, refused: Refused) -> None:
    (data / "valid.parquet").unlink()
    assert "valid.parquet" in refused("train", "--data", str(data))


def test_an_unknown_item_in_a_history_is_named(data: Path, refused: Refused) -> None:
    table = pq.read_table(data / "train.parquet").to_pydict()
    table["history"][7] = [3, 999]
    pq.write_table(pa.table(table), data / "train.parquet")
    message = refused("train", "--data", str(data))
    assert "train.parquet" in message
    assert "999" in message


def test_an_empty_title_is_named(data: Path, refused: Refused) -> None:
    table = pq.read_table(data / "items.parquet").to_pydict()
    table["title"][5] = ""
    pq.write_table(pa.table(table), data / "items.parquet")
    message = refused("train", "--data", str(data))
    assert "items.parquet" in message
    assert "5" in message


def test_a_model_without_end_of_sequence_is_refused(
    data: Path, tiny_model_dir: Path, tmp_path: Path, refused: Refused
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).is_file():
            content = json.loads((model / name).read_text())
            content["eos_token"] = None
            (model / name).write_text(json.dumps(content))
    assert "end-of-sequence" in refused("train", "--data", str(data), "--model", str(model))


def test_an_unknown_reward_is_named_before_anything_starts(data: Path, refused: Refused) -> None:
    message = refused("train", "--data", str(data), "rewards=[{name: no_such_reward}]")
    assert "no_such_reward" in message


def test_a_profile_without_its_gpus_is_refused(refused: Refused) -> None:
    message = refused("train", "--cluster", "8xA100")
    assert "8 GPU (found 0)" in message


def test_a_dry_run_prints_placement_arithmetic_and_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--cluster", "8xA100", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "4 x rollout worker  2 CPU, 1 GPU" in printed
    assert "64 prompts x 16 candidates = 1024 completions" in printed
    assert "zero_stage: 2" in printed
    assert not (tmp_path / "runs").exists()


def test_a_run_of_the_same_name_is_kept(data: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    message = refused("train", "--data", str(data), "--name", "mine")
    assert "RESUME=1" in message
    assert "OVERWRITE=1" in message


def test_to_resume_and_to_replace_is_refused(data: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    assert "give one of them" in refused("train", "--data", str(data), "--name", "mine", "--resume", "--overwrite")


def test_a_run_is_replaced_only_when_the_new_one_can_start(data: Path, tmp_path: Path, refused: Refused) -> None:
    kept = tmp_path / "runs" / "mine" / "checkpoints"
    kept.mkdir(parents=True)
    message = refused("train", "--data", str(data), "--name", "mine", "--overwrite", "rewards=[{name: rul}]")
    assert "rul" in message
    assert kept.is_dir()


def test_resuming_what_never_was_is_refused(refused: Refused) -> None:
    assert "nothing to resume" in refused("train", "--name", "ghost", "--resume")
