"""The examples of rewards do what their READMEs say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"


def run(*command: str | Path, **environment: str) -> str:
    """What a command prints; it must succeed."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=REPOSITORY,
        env=os.environ | {"COLUMNS": "120"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_my_reward_passes_its_own_tests() -> None:
    assert "4 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLES / "my_reward")


def test_my_reward_is_known_by_name_once_installed(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(EXAMPLES / "my_reward", source)
    run("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", target, source)
    check = ("-m", "launch.cli", "reward", "check")
    shown = run(*check, "same_brand", "--args", "bonus=2", "known=0.25", PYTHONPATH=str(target))
    assert "+0.5000" in shown
    assert "same_brand: 24 candidates in 4 groups, mean +0.1875" in shown
    assert "near_miss: 24 candidates in 4 groups" in run(*check, "near_miss", PYTHONPATH=str(target))


def test_my_reward_is_found_by_its_file() -> None:
    shown = run("-m", "launch.cli", "reward", "check", "examples/my_reward/my_reward/words.py:near_miss")
    assert "near_miss: 24 candidates in 4 groups" in shown


def test_the_http_scorer_answers_and_ends() -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    shown = run(EXAMPLES / "http_scorer" / "run.py")
    assert "http: 24 candidates in 4 groups, mean +0.2417, std 0.2999, from +0.0000 to +1.0000" in shown
