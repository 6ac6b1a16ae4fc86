"""Our numbers against the published code's, and the report's own honesty about sets that differ or are damaged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from learner.parity.__main__ import or_error, report
from learner.parity.comparison import Comparison, difference, unequal
from learner.parity.golden import GoldenError, GoldenSet
from learner.parity.losses import compare_losses
from learner.parity.rewards import compare_rewards

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def linked(golden_dir: Path, tmp_path: Path) -> Path:
    """A golden set of links, of which single files can be replaced."""
    folder = tmp_path / "golden"
    (folder / "trajectory").mkdir(parents=True)
    for path in golden_dir.iterdir():
        if path.name != "trajectory":
            (folder / path.name).symlink_to(path)
    return folder


def link_trajectory(golden_dir: Path, folder: Path, name: str) -> None:
    for path in (golden_dir / "trajectory").glob(f"{name}*"):
        if path.stem in (name, f"{name}_final", f"{name}_final_ref"):
            (folder / "trajectory" / path.name).symlink_to(path)


def test_rewards_and_advantages_equal_the_published_ones(golden_dir: Path) -> None:
    comparisons = list(compare_rewards(GoldenSet(golden_dir)))
    assert len(comparisons) == 11
    assert [comparison.line() for comparison in comparisons if not comparison.holds] == []


def test_losses_and_gradients_equal_the_published_ones(golden_dir: Path) -> None:
    comparisons = list(compare_losses(GoldenSet(golden_dir)))
    assert {"grpo: loss", "dapo: gradient L2", "gspo: gradient norm"} <= {
        comparison.name for comparison in comparisons
    }
    assert [comparison.line() for comparison in comparisons if not comparison.holds] == []


@pytest.mark.slow
def test_beams_and_a_training_run_equal_the_published_ones(golden_dir: Path, linked: Path) -> None:
    link_trajectory(golden_dir, linked, "ga1_cosine_sync2")
    done = subprocess.run(
        [sys.executable, "-m", "learner.parity", str(linked)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for expected in ("beams eval50", "sync2: candidates", "sync2: final weights", "sync2: final reference"):
        assert expected in done.stdout
    assert done.stdout.endswith("every comparison holds\n")


def test_a_changed_golden_value_does_not_hold(linked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((linked / "rewards.json").read_text())
    record["groups"][2]["results"]["ranking"]["rewards"][7] += 1e-3
    replace(linked / "rewards.json", json.dumps(record))
    assert report(compare_rewards(GoldenSet(linked))) == 1
    assert "rewards ranking: sum" in next(line for line in capsys.readouterr().out.split("\n") if "TOO LARGE" in line)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rewards.json", None, "rewards.json is missing"),
        ("rewards.json", "{", "rewards.json is damaged"),
        ("rewards.json", '{"groups": [{}]}', "rewards.json is damaged: it lacks 'item_ids'"),
        ("loss_batch1.safetensors", "nothing", "loss_batch1.safetensors is damaged"),
        ("items.parquet", "nothing", "items.parquet is damaged"),
    ],
)
def test_what_is_missing_or_damaged_is_named(
    linked: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, message: str
) -> None:
    replace(linked / name, content)
    golden = GoldenSet(linked)
    compare = compare_losses if name.startswith("loss") else compare_rewards
    assert report(or_error(compare(golden))) == 1
    assert message in capsys.readouterr().out


def test_a_folder_without_a_model_is_no_golden_set(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="not a golden set"):
        GoldenSet(tmp_path)


def test_differences_of_shape_and_nan_never_hold() -> None:
    assert not difference("shape", [1.0], [1.0, 2.0], 1e9).holds
    assert not difference("nan", [float("nan")], [1.0], 1e9).holds
    assert not unequal("length", [[1]], [[1], [2]]).holds
    assert unequal("equal", [[1], [2]], [[1], [2]]) == Comparison("equal: sequences that differ", 0, 0.0, 2)
    assert unequal("order", [[2], [1]], [[1], [2]]).largest == 2


def replace(path: Path, content: str | None) -> None:
    path.unlink()
    if content is not None:
        path.write_text(content)
