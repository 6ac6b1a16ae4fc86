"""What a continued run goes on with, and what it refuses to go on with."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from command_line import Refused

from catalog.build import build_catalog
from launch.cli import main
from launch.compose import compose
from launch.config import Config, ConfigError
from launch.run import _tell_how_to_go_on
from launch.run_directory import RunDirectory
from learner import checkpoint


class NothingStarts(Exception):
    """Raised in place of starting actors."""


def start_nothing(*arguments: object) -> None:
    raise NothingStarts


@pytest.mark.parametrize("cluster", [(), ("--cluster", "local")])
def test_a_copied_run_is_continued_under_its_own_name(
    cluster: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose(overrides=["name=first", "train.steps=7"])
    RunDirectory(config, "0").close()
    shutil.copytree("runs/first", "runs/copy")
    assert main(["train", "--name", "copy", "--resume", "--dry-run", *cluster]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert (resolved["name"], resolved["train"]["steps"]) == ("copy", 7)


def test_what_changes_in_a_continued_run_need_only_fit_its_own_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    RunDirectory(compose(overrides=["rollout.dtype=bfloat16", "learner.dtype=bfloat16"]), "0").close()
    assert main(["train", "--resume", "--dry-run", "learner.dtype=bfloat16"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["rollout"]["dtype"] == "bfloat16"


def test_yamls_that_are_named_again_change_nothing_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = {"train": {"checkpoint_every": 3, "seed": 5}}
    Path("mine.yaml").write_text(yaml.safe_dump(own))
    named = ["--data", "embedded", "--algorithm", "mine.yaml"]
    steps = ["train.steps=200", "train.checkpoint_every=7"]
    RunDirectory(compose(data="embedded", algorithm="mine.yaml", overrides=steps), "0").close()
    assert main(["train", *named, "--resume", "--dry-run", "train.checkpoint_every=9"]) == 0
    printed = capsys.readouterr()
    train = yaml.safe_load(printed.out)["train"]
    assert (train["steps"], train["checkpoint_every"], train["seed"]) == (200, 9, 5)
    assert "note: train.steps stays 200; DATA=, MODEL= and ALGORITHM= do not change it (80 there)" in printed.err
    assert "checkpoint_every" not in printed.err

    Path("mine.yaml").write_text(yaml.safe_dump({"train": {**own["train"], "seed": 6}}))
    assert main(["train", *named, "--resume", "--dry-run"]) == 1
    assert "train.seed is 6, but the run was started with 5" in capsys.readouterr().err


@pytest.mark.parametrize("resume", ["--resume", "--auto-resume"])
def test_a_yaml_that_overrides_complete_can_be_named_again(
    resume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("train: {keep_best: true}\nname: mine\n")
    complete = ["train.eval_every=20"]
    RunDirectory(compose(algorithm="mine.yaml", overrides=complete), "0").close()
    assert main(["train", "--algorithm", "mine.yaml", resume, "--dry-run", *complete]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "mine"


def test_a_profile_that_is_gone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    profile = Path("profile.yaml")
    profile.write_text("cluster: {object_store_gib: 1}\n")
    RunDirectory(compose("profile.yaml"), "0").close()
    profile.unlink()
    assert main(["train", "--resume", "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--dry-run", "--cluster", "local"]) == 1
    message = capsys.readouterr().err
    assert f"the run had the profile {profile.resolve()}" in message
    assert "or leave CLUSTER= out" in message


def test_a_run_is_started_the_first_time_and_continued_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "train.eval_beams=30", "--name", "mine", "--auto-resume", "--dry-run", "train.steps=7"]
    assert main(command) == 0
    new = capsys.readouterr().out
    assert [yaml.safe_load(new)["train"][key] for key in ("steps", "eval_beams")] == [7, 30]
    del command[1]
    RunDirectory(compose(overrides=["name=mine", "train.steps=5", "train.seed=3"]), "0").close()
    assert main(command) == 0
    continued = capsys.readouterr().out
    assert yaml.safe_load(continued)["train"]["seed"] == 3  # of the run
    assert "train.steps" in continued.partition("placement")[0]  # what is said to differ
    assert main(["train", "--name", "mine", "--auto-resume", "--dry-run", "--overwrite"]) == 1
    assert "give one of them" in capsys.readouterr().err


def test_to_resume_and_to_replace_is_refused(data: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    assert "give one of them" in refused("train", "--data", str(data), "--name", "mine", "--resume", "--overwrite")


def test_what_a_run_without_steps_is_resumed_with_says_how_to_keep_its_sft(
    data: Path, tmp_path: Path, refused: Refused
) -> None:
    RunDirectory(compose(data=str(data), overrides=["name=mine"]), "none").close()
    change = ["train", "--name", "mine", "--resume", "rewards=[{name: rule}]"]
    assert "MODEL=" not in refused(*change)
    (tmp_path / "runs/mine/checkpoints/sft").mkdir()
    assert "from its weights after SFT: MODEL=runs/mine/checkpoints/sft" in refused(*change)


def test_a_run_is_not_resumed_on_changed_data(
    data: Path, tiny_model_dir: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", "--data", str(data), "--model", str(tiny_model_dir), "--name", "mine"]
    config = compose(data=str(data), model=str(tiny_model_dir), overrides=["name=mine"])
    before = build_catalog(config.data, str(tiny_model_dir)).fingerprint
    RunDirectory(config, before).close()
    monkeypatch.setattr("launch.run.Actors", start_nothing)
    with pytest.raises(NothingStarts):  # the same data: the run goes on
        main([*command, "--resume"])
    table = pq.read_table(data / "train.parquet")
    pq.write_table(table.slice(0, 39), data / "train.parquet")
    after = build_catalog(config.data, str(tiny_model_dir)).fingerprint
    message = refused(*command, "--resume")
    assert f"the catalogue is {after}, but run runs/mine was started with {before}" in message
    assert "bring back the old ones, or start another run with NAME=" in message
    (tmp_path / "runs" / "mine" / "catalogue.json").unlink()
    assert "catalogue.json is missing" in refused(*command, "--resume")


@pytest.mark.parametrize("torn", ["step-4", "best"])
def test_a_torn_checkpoint_is_refused_before_anything_starts(
    torn: str, data: Path, tmp_path: Path, refused: Refused
) -> None:
    RunDirectory(compose(data=str(data), overrides=["name=mine"]), "none").close()
    path = tmp_path / "runs/mine/checkpoints"
    for name in ("step-4", "best"):
        (checkpoint.begin(path / name) / "model.safetensors").write_bytes(b"weights")
        checkpoint.commit(path / name, {"zero_stage": 0, "dtype": "float32", "lora_rank": 0})
    (path / torn / "model.safetensors").write_bytes(b"weig")
    message = refused("train", "--name", "mine", "--resume")
    assert f"{torn}: model.safetensors has 4 bytes instead of 7" in message


@pytest.mark.parametrize("name", ["step-4", "sft"])
def test_a_checkpoint_of_another_kind_is_refused_before_anything_starts(
    name: str, data: Path, tmp_path: Path, refused: Refused
) -> None:
    RunDirectory(compose(data=str(data), overrides=["name=mine", "learner.zero_stage=1"]), "none").close()
    path = tmp_path / "runs/mine/checkpoints" / name
    checkpoint.begin(path)
    checkpoint.commit(path, {"zero_stage": 1, "dtype": "float32", "lora_rank": 0})
    message = refused("train", "--name", "mine", "--resume", "learner.zero_stage=2")
    assert f"learner.zero_stage is 2, but runs/mine/checkpoints/{name} was written with 1" in message
    saved = yaml.safe_load((tmp_path / "runs/mine/config.yaml").read_text())
    assert saved["learner"]["zero_stage"] == 1


ARGS_OF_MY_RUNS = """'runs='"'"'my runs'"'"''"""  # for two shells: the user's and that of make


@pytest.mark.parametrize(
    ("name", "run_name", "more", "words"),
    [
        ("step-4", "mine", [], "NAME=mine goes on from runs/mine/checkpoints"),
        ("sft", "mine", [], "NAME=mine goes on from runs/mine/checkpoints"),
        ("sft", "mine", ["--cluster", "1xGPU"], "NAME=mine CLUSTER=1xGPU goes on from runs/mine/checkpoints"),
        ("sft", "my own", ["runs=else"], "NAME='my own' ARGS=runs=else goes on from else/my own/checkpoints"),
        (
            "sft",
            "mine",
            ["runs=my runs"],
            """NAME=mine ARGS='runs='"'"'my runs'"'"'' goes on from my runs/mine/checkpoints""",
        ),
    ],
)
def test_whatever_ends_a_run_says_how_it_goes_on(
    name: str,
    run_name: str,
    more: list[str],
    words: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def stopped(stop: BaseException) -> Callable[..., Any]:
        def run(config: Config, **_: bool) -> None:
            directory = RunDirectory(config, "none", overwrite=True)
            with ExitStack() as opened:
                opened.push(partial(_tell_how_to_go_on, config, directory))
                (directory.checkpoints / name).mkdir()
                raise stop

        return run

    for stop in (KeyboardInterrupt(), ConfigError("too late")):
        monkeypatch.setattr("launch.run.run", stopped(stop))
        assert main(["train", "--data", str(data), "--name", run_name, *more]) != 0
        assert f"RESUME=1 {words}/{name}\n" in capsys.readouterr().err


def test_a_run_that_ends_during_sft_says_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose(overrides=["name=mine"])
    directory = RunDirectory(config, "none", overwrite=True)
    ends = [RuntimeError("killed") for _ in range(2)]
    _tell_how_to_go_on(config, directory, RuntimeError, ends[0], None)
    (directory.path / "sft").mkdir()
    (directory.path / "sft/progress.json").write_text("{}")
    _tell_how_to_go_on(config, directory, RuntimeError, ends[1], None)
    assert not hasattr(ends[0], "__notes__")
    assert ends[1].__notes__ == ["RESUME=1 NAME=mine goes on from runs/mine/sft"]


def test_a_run_goes_on_from_no_checkpoint_that_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose(overrides=["name=mine"])
    directory = RunDirectory(config, "none", overwrite=True)
    (directory.checkpoints / "step-3").mkdir()
    damaged = checkpoint.CheckpointError("step-3 is damaged; step-2 is intact: delete step-3 to go on from there")
    _tell_how_to_go_on(config, directory, checkpoint.CheckpointError, damaged, None)
    assert not hasattr(damaged, "__notes__")


def test_a_run_that_has_lost_its_checkpoints_says_that_it_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.run.prepare_model", start_nothing)
    directory = RunDirectory(compose(overrides=["name=mine"]), "none")
    directory.close()
    for there in (False, True):
        if there:
            (directory.checkpoints / "step-3").mkdir()
            monkeypatch.setattr(checkpoint, "check", lambda path, **_: None)
            monkeypatch.setattr(checkpoint, "check_readers", lambda path, ours: None)
        with pytest.raises(NothingStarts):
            main(["train", "--name", "mine", "--resume"])
        said = "note: runs/mine/checkpoints holds no checkpoint: the run starts from its beginning"
        assert (said in capsys.readouterr().out) != there


def test_resuming_what_never_was_is_refused(refused: Refused) -> None:
    assert "nothing to resume" in refused("train", "--name", "ghost", "--resume")
