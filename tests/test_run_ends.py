"""Whole runs through the real components: what they survive, what they are refused for, how they end."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from whole_run import SMALL, actor_processes, finish, logged_steps, start, wait_for_actor, wait_for_step


def test_a_rollout_worker_that_dies_with_stale_flights_queued_comes_back(tmp_path: Path) -> None:
    """With a queue of one table the flights behind it wait at the worker when it is killed."""
    stale = ("learner.sft.epochs=0", "train.staleness=2", "rollout.queue_tables=1", "rollout.groups_per_table=1")
    settings = (*SMALL, *stale, "rollout.timeout_s=60")
    process = start(tmp_path, "--name", "stale", "--steps", "8", settings=settings)
    run = tmp_path / "runs" / "stale"
    wait_for_step(process, run, 3)
    for child in actor_processes(process, "RolloutWorker"):
        child.kill()
    output = finish(process)
    assert process.returncode == 0, output
    assert logged_steps(run, "train") == list(range(1, 9))


def test_a_model_that_workers_and_learner_compute_differently_is_refused_before_sft(tmp_path: Path) -> None:
    process = start(tmp_path, "--name", "differs", "--steps", "1", "learner.mismatch_limit=1e-12")
    output = finish(process)
    assert process.returncode == 1
    assert "learner.mismatch_limit=1e-12" in output
    assert "SFT  " not in output
    assert not (tmp_path / "runs" / "differs").exists()


def test_weights_that_ranks_of_a_worker_cannot_take_are_refused_before_sft(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """vLLM holds GPT-2's matrices transposed, and two ranks of a worker hold parts of them."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    shape = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 1024}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    arguments = "--name", "gpt2", "--model", str(tmp_path / "gpt2"), "--steps", "1", "rollout.tensor_parallel=2"
    process = start(tmp_path, *arguments)
    output = finish(process)
    assert process.returncode == 1
    assert "set rollout.tensor_parallel=1" in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs" / "gpt2").exists()


def test_a_reward_that_fails_is_found_before_sft(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def short(group):\n    return [1.0] * (len(group.candidate_titles) - 1)\n")
    process = start(tmp_path, "--name", "short", "--steps", "1", "rewards=[{name: rule}, {name: 'mine.py:short'}]")
    output = finish(process)
    assert process.returncode == 1
    assert "reward 'short' returned 15 values" in output
    assert "SFT  " not in output
    assert not (tmp_path / "runs" / "short").exists()


def test_sigterm_while_actors_start_ends_everything(tmp_path: Path) -> None:
    process = start(tmp_path, "--name", "ended", "--steps", "1000")
    wait_for_actor(process, "RolloutWorker")
    started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    output = finish(process)
    assert process.returncode == 130, output
    assert "interrupted; everything that was started has been ended" in output
    assert "SIGTERM received" not in output
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive


@pytest.mark.parametrize("times", [1, 5])
def test_ctrl_c_ends_everything_however_often(tmp_path: Path, times: int) -> None:
    process = start(tmp_path, "--name", "stopped", "--steps", "1000")
    wait_for_step(process, tmp_path / "runs" / "stopped", 1)
    started = psutil.Process(process.pid).children(recursive=True)
    for _ in range(times):
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3)
    output = finish(process)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive


def test_sigterm_that_ray_answers_while_it_starts_does_not_abort_the_driver() -> None:
    """Ray's own answer prints its stack, hands on, and lets an alarm abort the process 3 s later."""
    script = (
        "import os, ray, signal, sys, time; from launch.actors import _own_sigterm\n"
        "try:\n"
        "    with _own_sigterm():\n"
        "        ray.init(address='local', include_dashboard=False, num_cpus=1, object_store_memory=2**27)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "except BaseException as stop:\n"
        "    time.sleep(5)\n"
        "    sys.exit(130)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert "SIGTERM received" in ended.stderr
    assert ended.returncode == 130, ended.stderr
