"""Whole runs through the real components: what they leave, and how they go on."""

import json
import shutil
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM
from whole_run import SMALL, actor_processes, finish, logged_lines, logged_steps, start, wait_for_step

from catalog.build import build_catalog
from catalog.config import DataConfig, GeneratedConfig
from launch.cli import main
from launch.compare import FinishedRun, comparison, finished
from launch.compose import load
from launch.config import ConfigError
from launch.policy_of_run import PolicyOfRun
from launch.recommend import prompt_tokens, recommend
from launch.run import _catalog_words


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
    assert "its process has ended; waiting for a new one" in output
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
    assert not (finished_run / "sft").exists()  # where SFT kept its best weights
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
    asked = PolicyOfRun.of(finished_run)
    groups = list(recommend(asked, histories, 4))
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
    repeated = [[catalog.title(int(item_class)) for item_class in groups[0].item_class[:2]]]
    (new,) = recommend(asked, repeated, 57, unseen=True)
    found = [catalog.title(int(item_class)) for item_class in new.item_class]
    assert len(found) == min(57, len(catalog.titles) - 2)
    assert not {*found} & {*repeated[0]}
    assert [*new.score] == sorted(new.score, reverse=True)


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
    """Its cache holds the beams of training, but not those of the evaluation, which is found before SFT."""
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    settings = (*SMALL, "train.eval_beams=60", "rollout.kv_cache_gib=0.00056")  # 72 blocks
    process = start(finished_run.parent.parent, "--name", "whole", "--overwrite", settings=settings)
    output = finish(process)
    assert process.returncode == 1
    assert "with 60 beams needs" in output
    assert "SFT  " not in output
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


@pytest.mark.parametrize(("limit", "cut"), [(200, True), (4000, False)])
def test_a_run_says_how_many_prompts_were_cut(tmp_path: Path, tiny_tokenizer_dir: Path, limit: int, cut: bool) -> None:
    small = GeneratedConfig(items=60, users=60)
    data = DataConfig(cache=str(tmp_path), generated=small, max_prompt_tokens=limit)
    catalog = build_catalog(data, str(tiny_tokenizer_dir))
    words = f", {catalog.stats['truncated_prompts']} prompts cut to data.max_prompt_tokens"
    assert _catalog_words(catalog).endswith(" trie nodes" + (words if cut else ""))
