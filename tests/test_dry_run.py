"""A dry run says what a run would do, and refuses what one would refuse, before anything is built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import Refused

from catalog.build import build_catalog
from catalog.config import DataConfig
from launch.cli import main
from launch.compose import compose
from launch.preflight import _candidates
from launch.run_directory import RunDirectory
from learner import checkpoint
from rollout.config import RolloutConfig, Strategy

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["007", "1e3", "true", "${data.path}"])
def test_a_name_is_taken_as_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--name", name, "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["name"] == name


def test_a_dry_run_prints_placement_arithmetic_and_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--cluster", "8xA100", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "4 x rollout worker  2 CPU, 1 GPU" in printed
    assert "64 prompts -> 1024 candidates per step; steps, micro-batches" in printed
    assert "zero_stage: 2" in printed
    assert "note:" not in printed
    assert not (tmp_path / "runs").exists()
    assert "Hugging Face hub" not in printed
    assert main(["train", "--dry-run", "--model", "Qwen/Qwen3-0.6B"]) == 0
    assert "there is no folder Qwen/Qwen3-0.6B; the Hugging Face hub will be asked" in capsys.readouterr().out
    assert main(["train", "--dry-run", "learner.updates_per_batch=2"]) == 0
    assert "#   note: learner.updates_per_batch=2 without learner.clip_low" in capsys.readouterr().out


@pytest.mark.parametrize(("strategy", "candidates"), [("beam", 3), ("dynamic", 3), ("sample", 16)])
def test_groups_have_no_more_candidates_than_there_are_titles(strategy: Strategy, candidates: int) -> None:
    assert _candidates(RolloutConfig(strategy=strategy), titles=3) == candidates


def test_a_dry_run_refuses_what_a_run_would(data: Path, tmp_path: Path, refused: Refused) -> None:
    assert "there is nothing to resume" in refused("train", "--dry-run", "--resume", "--name", "ghost")
    RunDirectory(compose(data=str(data), overrides=["name=mine"]), "none").close()
    checkpoint.begin(tmp_path / "runs/mine/checkpoints/step-9")
    checkpoint.commit(tmp_path / "runs/mine/checkpoints/step-9", {"zero_stage": 2, "dtype": "float32", "lora_rank": 0})
    assert "was written with 2" in refused("train", "--dry-run", "--resume", "--name", "mine")


def test_a_dry_run_of_a_name_that_is_taken_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    RunDirectory(compose(), "none").close()
    assert main(["train", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "# run runs/default exists: RESUME=1 continues it" in printed
    assert yaml.safe_load(printed)["name"] == "default"


def test_a_dry_run_of_a_resumed_one_names_what_changes(
    data: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = compose(data=str(data), model=str(tiny_model_dir), overrides=["name=mine"])
    RunDirectory(config, build_catalog(config.data, str(tiny_model_dir)).fingerprint).close()
    resumed = ["train", "--name", "mine", "--resume", "--dry-run"]
    assert main([*resumed, "train.steps=7"]) == 0
    assert "# train.steps: None until now, 7 from now on" in capsys.readouterr().out
    (tmp_path / "runs/mine/catalogue.json").write_text('{"fingerprint": "0"}')
    assert "runs/mine was started with 0" in refused(*resumed)


def test_a_dry_run_knows_the_arithmetic_of_a_catalogue_that_is_built(
    data: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    build_catalog(DataConfig(path=str(data)), str(tiny_model_dir))
    command = ["train", "--data", str(data), "--model", str(tiny_model_dir), "--dry-run"]
    assert main([*command, "train.epochs=3"]) == 0
    printed = capsys.readouterr().out
    assert "3 steps" in printed
    assert "RL: 32 prompts -> 512 candidates per step, 32 prompts per rank and update in about" in printed
    assert "SFT: 128 examples per rank and update, 1 update per epoch" in printed
    assert main([*command, "train.prompts_per_step=41"]) == 1
    assert "the training split has 40 examples" in capsys.readouterr().err
    assert main([*command, "learner.micro_batch_tokens=20"]) == 1
    assert "less than one prompt with one title" in capsys.readouterr().err


def test_the_longest_title_is_shown_where_it_is_too_long_and_not_where_free_text_is(
    data: Path, tiny_model_dir: Path, refused: Refused
) -> None:
    build_catalog(DataConfig(path=str(data)), str(tiny_model_dir))
    command = ("train", "--data", str(data), "--model", str(tiny_model_dir), "--dry-run")
    command += ("rollout.strategy=unconstrained",)
    error = refused(*command, "rollout.max_completion_tokens=2000")
    assert "completions up to 2000" in error
    assert "lower rollout.max_completion_tokens" in error
    assert "longest title" not in error
    assert "The longest title is '" in refused(*command, "rollout.vllm={max_model_len: 20}")


def test_a_dry_run_is_quick(tmp_path: Path) -> None:
    code = (
        "import sys; from launch.cli import main; main(['train', '--dry-run']); "
        "print(sorted({'torch', 'transformers', 'vllm', 'deepspeed'} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert printed.stdout.splitlines()[-1:] == ["[]"], printed.stderr


@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learner.objective=nope"], "no objective 'nope'; known are ['dapo', 'grpo'"),
        (
            ["learner.objective=no_such_module:loss"],
            "objective 'no_such_module:loss': there is no module 'no_such_module'",
        ),
        (
            ["learner.deepspeed={bf16: {enabled: true}}"],
            "learner.deepspeed.bf16 is the learner's own: set learner.dtype",
        ),
        (["rollout.vllm={dtype: float16}"], "rollout.vllm.dtype is the project's own: set rollout.dtype instead"),
        (["rewards=[{name: rul}]"], "reward 'rul' is not registered; did you mean 'rule'"),
        (["rewards=[{name: ranking, args: {formla: dcg}}]"], "formla"),
        (["rewards=[{name: rule}, {name: rule}]"], "two rewards are called 'rule'"),
        (["learner.ranks=3", "train.prompts_per_step=2"], "train.prompts_per_step=2 gives some of learner.ranks=3"),
        (["learner.ranks=3", "learner.sft.batch_size=2"], "learner.sft.batch_size=2 is smaller than learner.ranks=3"),
        (["learner.offload_optimizer=true"], "learner.offload_optimizer needs learner.zero_stage of 1, 2 or 3"),
        (["model.hidden=64"], "model.hidden / model.heads = 16: vLLM has attention on CPUs for head sizes 32"),
        (["name=.."], "name=..: must be a plain folder name that does not begin with a dot"),
    ],
)
def test_what_the_configuration_tells_is_refused_before_anything_is_built(
    dry_run: list[str], overrides: list[str], message: str, tmp_path: Path, refused: Refused
) -> None:
    assert message in refused("train", *dry_run, *overrides)
    assert not list(tmp_path.iterdir())


def test_an_objective_of_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_objective.py").write_text(
        "import torch\nfrom learner.objectives import objective\n\n"
        "@objective(mean_over='completions')\ndef mine(batch, config):\n    return batch.token_mean(-batch.logp), {}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", "learner.objective=my_objective:mine"]) == 0
    assert main(["train", "--dry-run", "learner.objective=my_objective.py:mine"]) == 0
    (tmp_path / "losses").mkdir()
    (tmp_path / "my_objective.py").rename(tmp_path / "losses" / "another.py")
    assert main(["train", "--dry-run", "learner.objective=losses/another.py:mine"]) == 0


def test_an_objective_is_tried_as_the_run_will_call_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stale.py").write_text(
        "from learner.objectives import objective\n\n"
        "@objective(mean_over='completions')\ndef mine(batch, config):\n"
        "    weight = 1.0 if batch.logp_rollout is None else importance(batch)\n"
        "    return -batch.token_mean(batch.logp) * weight, {}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", "learner.objective=stale.py:mine"]) == 0
    assert main(["train", "--dry-run", "learner.objective=stale.py:mine", "train.staleness=1"]) == 1
    assert "name 'importance' is not defined" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return batch.token_mean(-batch.logp)", "returned Tensor; it must return (contributions, metrics)"),
        ("return -batch.logp.mean(), {}", "must be one number per completion, a tensor of shape (4,); got ()"),
        ("return batch.token_mean(-batch.logp), {'size': 1.0}", "size must be one number per completion"),
        ("return batch.advantages, {}", "do not depend on batch.logp"),
        ("return batch.token_mean(batch.logp.log()), {}", "are not finite"),
        ("raise KeyError('mine')", "in lossy"),
    ],
)
def test_what_an_objective_does_wrong_is_said_before_anything_starts(
    body: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"lossy_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(
        "from learner.objectives import objective\n\n"
        f"@objective(mean_over='completions')\ndef lossy(batch, config):\n    {body}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["train", "--dry-run", f"learner.objective={name}:lossy"]) == 1
    error = capsys.readouterr().err
    assert f"error: objective {name}:lossy" in error
    assert message in error
