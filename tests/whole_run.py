"""Whole runs as a user starts them: a small one, what it has logged, its processes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

SMALL = [
    "data.generated.items=60",
    "data.generated.users=60",
    "model.hidden=64",
    "model.heads=2",
    "model.kv_heads=1",
    "model.layers=1",
    "model.vocabulary=400",
    "rollout.kv_cache_gib=0.1",
    "rollout.groups_per_table=4",
    "cluster.object_store_gib=0.25",
    "learner.sft.epochs=2",
    "train.prompts_per_step=8",
    "train.eval_examples=16",
    "train.eval_beams=10",
    "train.eval_ks=[1,10]",
    "train.rollouts_every=1",
    "train.checkpoint_every=1",
    "train.eval_every=2",
    "train.keep_best=true",
]


def start(cwd: Path, *arguments: str, settings: Sequence[str] = SMALL) -> subprocess.Popen[str]:
    """A run in `cwd`, a folder of pytest; runs of a session share the model and catalogue that the first makes."""
    shared = [f"data.cache={cwd.parent / 'whole-runs'}"] if settings else []
    command = [sys.executable, "-m", "launch.cli", "train", *arguments, *settings, *shared]
    others = {"RAY_ADDRESS": "127.0.0.1:9"}  # a cluster of somebody else's, which a run with a Ray of its own ignores
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | others,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=500)
    return output


def logged_lines(run: Path, phase: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == phase]


def logged_steps(run: Path, phase: str) -> list[int]:
    return [line["step"] for line in logged_lines(run, phase)]


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int, phase: str = "train") -> None:
    deadline = time.monotonic() + 400
    while not ((run / "metrics.jsonl").exists() and step in logged_steps(run, phase)):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.1)


def wait_for_actor(process: subprocess.Popen[str], name: str) -> None:
    deadline = time.monotonic() + 300
    while not actor_processes(process, name):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, f"no {name} has started"
        time.sleep(0.1)


def actor_processes(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if f"ray::{name}" in _command(child)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has ended meanwhile, or is a zombie
        return ""
