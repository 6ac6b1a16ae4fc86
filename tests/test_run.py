"""Whole runs through the real components: what they leave, what they survive, how they end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from catalog.build import build_catalog
from launch.cli import main
from launch.compare import FinishedRun, comparison, finished
from launch.compose import load
from launch.config import ConfigError
from launch.recommend import prompt_tokens, recommend

SMALL = [
    "data.generated.items=60",
    "data.generated.users=120",
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
    command = [sys.executable, "-m", "launch.cli", "train", *arguments, *settings]
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
    output, _ = process.communicate(timeout=280)
    return output


def logged_lines(run: Path, phase: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == phase]


def logged_steps(run: Path, phase: str) -> list[int]:
    return [line["step"] for line in logged_lines(run, phase)]


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int, phase: str = "train") -> None:
    deadline = time.monotonic() + 200
    while not ((run / "metrics.jsonl").exists() and step in logged_steps(run, phase)):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.1)


def actor_processes(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if f"ray::{name}" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, with the learner killed after the first epoch of SFT and the rollout worker in RL."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, "--name", "whole", "--steps", "3")
    run = folder / "runs" / "whole"
    wait_for_step(process, run, 1, "sft")
    for child in actor_processes(process, "LearnerRank"):
        child.kill()
    wait_for_step(process, run, 1)
    for child in actor_processes(process, "RolloutWorker"):
        child.kill()
    output = finish(process)
    assert process.returncode == 0, output
    assert "starting all ranks again (1 of 3 times at most)" in output
    return run


def test_a_run_leaves_what_it_promises(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["name"] == "whole"
    assert (summary["steps"], summary["groups"], summary["invalid_candidates"]) == (3, 24, 0)
    for stage in ("sft", "rl", "best_possible"):
        assert set(summary["metrics"][stage]) == {"hr@1", "hr@10", "ndcg@1", "ndcg@10"}
    assert set(summary["ndcg@10_gain"]) == {"mean", "low", "high"}
    assert set(summary["timing_s"]) == {"rollout", "reward", "learn", "sync", "step"}
    # one worker: the trial before training, version 0 to be evaluated and to start from, a version after each step
    assert summary["weights_checksum_ok"] is True
    assert summary["confirmed_weight_loads"] == 1 + 1 + 3
    assert "vllm" in summary["versions"]
    assert set(logged_steps(finished_run, "sft")) == {1, 2}
    assert logged_steps(finished_run, "train") == [1, 2, 3]
    assert all(line["rollout/tokens_per_s"] > 0 for line in logged_lines(finished_run, "train"))
    assert logged_steps(finished_run, "valid") == [2]
    assert {path.name for path in (finished_run / "rollouts").iterdir()} == {f"step-{i}.parquet" for i in (1, 2, 3)}
    assert not (finished_run / "sft").exists()  # where the warm-up kept its best weights
    groups = pq.read_table(finished_run / "rollouts" / "step-1.parquet")
    for group in groups.to_pylist():
        hits = [title == group["target_title"] for title in group["candidate_titles"]]
        assert hits == [item_class == group["target_class"] for item_class in group["candidate_class"]]
    assert (finished_run / "checkpoints" / "step-3" / "model.safetensors").is_file()
    assert "<h1>whole</h1>" in (finished_run / "report.html").read_text()


def test_its_policy_recommends_as_hugging_face_would_rank(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished_run.parent.parent)  # its configuration names the cache from here
    catalog = build_catalog(load(finished_run / "config.yaml").data, str(finished_run / "checkpoints" / "step-3"))
    histories = [[catalog.title(3), catalog.title(7)], [catalog.title(5), "Acme Bolt, of another shop"]]
    _, groups = recommend(finished_run, histories, 4)
    path = finished_run / "checkpoints" / "step-3"
    policy = AutoModelForCausalLM.from_pretrained(path)
    prompts = prompt_tokens(load(finished_run / "config.yaml").data, str(path), histories)
    for prompt, group in zip(prompts, groups, strict=True):
        assert len(group.tokens) == 4
        for tokens, score in zip(group.tokens, group.score, strict=True):
            with torch.no_grad():
                logits = policy(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.from_numpy(tokens).long()[:, None]).sum()
            assert score == pytest.approx(float(expected), abs=1e-3)


def test_its_checkpoints_can_be_evaluated(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(finished_run), "--out", "newest.json"]) == 0
    asked, known = json.loads(Path("newest.json").read_text()), json.loads((finished_run / "eval-rl.json").read_text())
    assert asked["checkpoint"] == str(finished_run / "checkpoints" / "step-3")
    assert {name: asked[name] for name in ("example_ids", "hit_ranks", "metrics")} == {
        name: known[name] for name in ("example_ids", "hit_ranks", "metrics")
    }
    assert f"NDCG@10 │ {known['metrics']['ndcg@10']:.4f}" in capsys.readouterr().out


def test_the_best_validated_policy_is_kept(finished_run: Path) -> None:
    best, step_2 = (finished_run / "checkpoints" / name / "model.safetensors" for name in ("best", "step-2"))
    assert best.read_bytes() == step_2.read_bytes()


def test_it_can_be_compared(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_run.parent.parent)
    other = finished_run.with_name("other")
    shutil.copytree(finished_run, other)
    columns, rows = comparison([FinishedRun(finished_run), FinishedRun(other)])
    same = dict(zip(columns, rows[1], strict=True))
    assert (same["run"], same["steps"], same["gain"]) == ("other", "3", "+0.0000")
    assert same["95% interval"] == "+0.0000 to +0.0000"
    after = json.loads((other / "eval-rl.json").read_text())
    after["hit_ranks"] = [0] * len(after["hit_ranks"])
    (other / "eval-rl.json").write_text(json.dumps(after))
    _, rows = comparison([FinishedRun(finished_run), FinishedRun(other)])
    before = json.loads((finished_run / "summary.json").read_text())["metrics"]["rl"]["ndcg@10"]
    assert dict(zip(columns, rows[1], strict=True))["gain"] == f"{1 - before:+.4f}"
    after["example_ids"][0] += 1
    (other / "eval-rl.json").write_text(json.dumps(after))
    _, rows = comparison([FinishedRun(finished_run), FinishedRun(other)])
    assert dict(zip(columns, rows[1], strict=True))["95% interval"] == "other examples"
    monkeypatch.chdir("/")
    _, rows = comparison([FinishedRun(finished_run), FinishedRun(other)])
    assert dict(zip(columns, rows[1], strict=True))["95% interval"] == "other examples"
    (other / "catalogue.json").write_text('{"fingerprint": "gone"}')
    _, rows = comparison([FinishedRun(finished_run), FinishedRun(other)])
    assert dict(zip(columns, rows[1], strict=True))["95% interval"] == "catalogue not found"
    (other / "summary.json").unlink()
    (stray := finished_run.with_name("notes.txt")).touch()
    assert [run.name for run in finished([other, finished_run, stray])] == [finished_run.name]
    assert "left out: other, notes.txt" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="only finished runs can be compared"):
        FinishedRun(other)


def test_rollout_and_learner_agree_on_the_log_probabilities(finished_run: Path) -> None:
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["mismatch"] < 1e-3 for line in lines if line["phase"] == "train")


@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_a_worker_and_a_rank_take_one_gpu_in_turn(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    process = start(tmp_path, "--cluster", "1xGPU", "--name", "gpu", "--steps", "2")
    output, _ = process.communicate(timeout=1150)
    assert process.returncode == 0, output
    run = tmp_path / "runs" / "gpu"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["invalid_candidates"], summary["confirmed_weight_loads"]) == (2, 0, 1 + 1 + 2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["mismatch"] < 0.5 for line in lines if line["phase"] == "train")  # of sums in bfloat16


def test_a_run_goes_on_where_it_stopped_and_survives_a_dead_learner(finished_run: Path) -> None:
    process = start(finished_run.parent.parent, "--name", "whole", "--steps", "6", "--resume", settings=())
    wait_for_step(process, finished_run, 4)
    process.send_signal(signal.SIGSTOP)  # else it might end before the one beside it has started
    try:
        beside = start(finished_run.parent.parent, "--name", "whole", "--steps", "6", "--resume", settings=())
        assert f"is in use by process {process.pid} on" in finish(beside)
        for child in actor_processes(process, "LearnerRank"):
            child.kill()
    finally:
        process.send_signal(signal.SIGCONT)
    output = finish(process)
    assert "starting all ranks again" in output
    assert process.returncode == 0, output
    steps = logged_steps(finished_run, "train")
    assert steps[:4] == [1, 2, 3, 4]
    assert steps[-1] == 6
    assert "train.steps: 3 until now, 6 from now on" in output


def test_a_run_that_has_gone_further_is_not_cut_short(finished_run: Path) -> None:
    folder, summary = finished_run.parent.parent, (finished_run / "summary.json").read_text()
    done = max(logged_steps(finished_run, "train"))
    process = start(folder, "--name", "whole", "--steps", "2", "--resume", settings=())
    assert f"run whole has done {done} steps; give STEPS={done} or more" in finish(process)
    assert (finished_run / "summary.json").read_text() == summary


def test_a_run_is_only_replaced_by_one_that_starts(finished_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    settings = (*SMALL, "rollout.kv_cache_gib=0.0001")
    process = start(finished_run.parent.parent, "--name", "whole", "--overwrite", settings=settings)
    assert "rollout.kv_cache_gib=0.0001" in finish(process)
    assert process.returncode == 1
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


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


def test_a_model_that_workers_and_learner_compute_differently_is_refused_before_the_warm_up(tmp_path: Path) -> None:
    process = start(tmp_path, "--name", "differs", "--steps", "1", "learner.mismatch_limit=1e-12")
    output = finish(process)
    assert process.returncode == 1
    assert "learner.mismatch_limit=1e-12" in output
    assert "SFT  " not in output
    assert not (tmp_path / "runs" / "differs").exists()


def test_weights_that_ranks_of_a_worker_cannot_take_are_refused_before_the_warm_up(
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


def test_a_reward_that_fails_is_found_before_the_warm_up(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def short(group):\n    return [1.0] * (len(group.candidate_titles) - 1)\n")
    process = start(tmp_path, "--name", "short", "--steps", "1", "rewards=[{name: rule}, {name: 'mine.py:short'}]")
    output = finish(process)
    assert process.returncode == 1
    assert "reward 'short' returned 15 values" in output
    assert "SFT  " not in output
    assert not (tmp_path / "runs" / "short").exists()


def test_a_cache_too_small_for_the_evaluation_is_refused_before_the_warm_up(tmp_path: Path) -> None:
    beams = ("train.eval_beams=60", "rollout.kv_cache_gib=0.00056")  # 72 blocks: enough for the 16 of training
    process = start(tmp_path, "--name", "small", "--steps", "1", settings=(*SMALL, *beams))
    output = finish(process)
    assert process.returncode == 1
    assert "with 60 beams needs" in output
    assert "SFT  " not in output
    assert not (tmp_path / "runs" / "small").exists()


def test_sigterm_while_actors_start_ends_everything(tmp_path: Path) -> None:
    process = start(tmp_path, "--name", "ended", "--steps", "1000")
    deadline = time.monotonic() + 100
    while not actor_processes(process, "RolloutWorker"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    output = finish(process)
    assert process.returncode == 130, output
    assert "interrupted; everything that was started has been ended" in output
    assert "SIGTERM received" not in output
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive


def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    process = start(tmp_path, "--name", "stopped", "--steps", "1000")
    wait_for_step(process, tmp_path / "runs" / "stopped", 1)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
