"""The Slurm job of examples/slurm, with Slurm's and the project's commands replaced; the real ones need a cluster."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

JOB = REPOSITORY / "examples/slurm/train.sbatch"


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """Those of a job on one node, whose run writes its arguments and waits for SIGTERM where they say so."""
    commands = {
        ".venv/bin/rere": 'echo "rere $*"\ncase "$*" in *wait*) trap "exit 130" TERM; touch started; '
        "while true; do sleep 0.1; done;; esac\n",
        "slurm/scontrol": 'echo "scontrol $*"\n',
    }
    for name, content in commands.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"#!/bin/bash\n{content}")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "TMPDIR": str(tmp_path)}
    return os.environ | job | {"VENV": ".venv", "PATH": f"{tmp_path}/slurm:{os.environ['PATH']}"}


def job(variables: dict[str, str], *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(["bash", JOB, *arguments], env=variables, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("restarts", "more"), [({}, ""), ({"SLURM_RESTART_COUNT": "1"}, " --auto-resume")])
def test_a_job_that_was_started_again_continues_its_run(
    variables: dict[str, str], restarts: dict[str, str], more: str
) -> None:
    ended = job(variables | restarts, "--name", "mine", "a.b=c")
    assert ended.communicate(timeout=60)[0] == f"rere train --name mine a.b=c{more}\n"
    assert ended.returncode == 0


@pytest.mark.parametrize(
    ("signum", "answer"), [(signal.SIGUSR1, "scontrol requeue 7\n"), (signal.SIGTERM, "")], ids=["limit", "preempted"]
)
def test_a_run_is_ended_and_before_the_time_limit_queued_again(
    variables: dict[str, str], tmp_path: Path, signum: int, answer: str
) -> None:
    running = job(variables, "wait")
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    running.send_signal(signum)
    assert running.communicate(timeout=60)[0] == "rere train wait\n" + answer
    assert running.returncode != 0


def test_a_missing_environment_is_named(variables: dict[str, str]) -> None:
    ended = job(variables | {"VENV": ".nothing"}, "--name", "mine")
    assert ".nothing/bin/rere is missing: make setup DEVICE=gpu" in ended.communicate(timeout=60)[0]
    assert ended.returncode == 1
