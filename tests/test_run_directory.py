"""The folder of a run: what it keeps, what it replaces, who may use it."""

import errno
import os
import shutil
import socket
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
from command_line import Refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from catalog.atomic import CannotWrite
from launch.compose import compose
from launch.config import ConfigError
from launch.run_directory import RunDirectory, in_use, lock_file
from learner import checkpoint


def test_a_runs_folder_that_cannot_be_is_named(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    assert "runs=file: no run can be written there" in refused("train", "runs=file")
    assert "runs=file/deeper: no run can be written there" in refused("train", "runs=file/deeper", "--dry-run")


def test_a_damaged_catalogue_file_is_named(tmp_path: Path) -> None:
    config = compose(overrides=[f"runs={tmp_path}"])
    RunDirectory(config, "0").close()
    for content in ("", "{}", "[1]", '{"fingerprint": "0", "cache": null}', '{"fingerprint": "0", "data": 3}'):
        (tmp_path / "default" / "catalogue.json").write_text(content)
        with pytest.raises(ConfigError, match=r"catalogue\.json is missing or damaged"):
            RunDirectory.check_catalogue(config, "0")


@pytest.mark.parametrize("left", [[], ["catalogue.json"]])
def test_what_a_run_leaves_that_was_killed_as_it_made_its_folder_is_no_run(tmp_path: Path, left: list[str]) -> None:
    config = compose(overrides=[f"runs={tmp_path}"])
    (tmp_path / "default").mkdir()
    for name in left:
        (tmp_path / "default" / name).write_text("{")
    RunDirectory(config, "0").close()
    with pytest.raises(ConfigError, match="RESUME=1 continues it"):
        RunDirectory(config, "0")


def test_a_line_that_was_torn_off_is_forgotten_on_resume(tmp_path: Path) -> None:
    config = compose(overrides=[f"runs={tmp_path}"])
    run = RunDirectory(config, "0")
    run.log("train", 1, {"loss": 1.0})
    run.close()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "train", "step": 2, "lo')
    run = RunDirectory(config, "0", resume=True)
    run.log("train", 2, {"loss": 2.0})
    run.close()
    assert [line["loss"] for line in run.metrics("train", steps=2)] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("line", "evaluation"),
    [(b'{"phase": "train", "st\0\0\0\n', '{"example_ids": ['), (b"[]\n", "[]"), (b"null\n", "null"), (b"{}\n", "{}")],
)
def test_what_is_damaged_of_a_run_is_named(tmp_path: Path, refused: Refused, line: bytes, evaluation: str) -> None:
    run = RunDirectory(compose(overrides=[f"runs={tmp_path}"]), "0")
    run.log("train", 1, {"loss": 1.0})
    run.close()
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(line)
    message = refused("train", f"runs={tmp_path}", "--resume")
    assert "default/metrics.jsonl, line 2 is damaged" in message
    assert "delete that line" in message
    (run.path / "eval-sft.json").write_text(evaluation)
    with pytest.raises(ConfigError, match=r"eval-sft\.json is damaged"):
        run.read_json("eval-sft.json", "example_ids")


def test_a_run_whose_folder_is_removed_says_so(tmp_path: Path) -> None:
    run = RunDirectory(compose(overrides=[f"runs={tmp_path}"]), "0")
    shutil.rmtree(run.path)
    with pytest.raises(CannotWrite, match=r"default/metrics\.jsonl cannot be written"):
        run.log("train", 1, {"loss": 1.0})


def test_a_full_disk_is_named_that_tensorboard_meets_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(compose(overrides=[f"runs={tmp_path}"]), "0")
    run.close()
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(run, "_event_file", Mock(add=full, close=full))
    monkeypatch.setattr(run, "_trackers", trackers := Mock())
    for call in (lambda: run.log("train", 1, {"loss": 1.0}), lambda: run.go_on_after(1), run.close):
        with pytest.raises(CannotWrite, match=r"default/tensorboard cannot be written: .*No space left"):
            call()
    trackers.close.assert_called_once_with()


def test_steps_that_a_shorter_resumed_run_no_longer_has_do_not_count(tmp_path: Path) -> None:
    run = RunDirectory(compose(overrides=[f"runs={tmp_path}"]), "0")
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 4.0)):
        run.log("train", step, {"loss": loss})
    run.log("sft", 1, {"loss": 9.0})
    run.close()
    assert [line["loss"] for line in run.metrics("train", steps=2)] == [1.0, 4.0]


def test_only_plain_numbers_are_steps(tmp_path: Path) -> None:
    for name in ("step-3", "step-²", "step-x"):
        (tmp_path / name).mkdir()
    assert checkpoint.steps_done(tmp_path) == 3


def test_the_best_policy_is_one_of_the_run(tmp_path: Path) -> None:
    run = RunDirectory(compose(overrides=[f"runs={tmp_path}"]), "0")
    found = []
    for step, value in ((2, 0.25), (4, 0.5), (6, 0.5), (4, 0.4), (6, 0.3), (8, 1.0)):
        if len(found) == 3:
            run.go_on_after(2)  # what step 4 was is gone, and it comes out otherwise the second time
        found.append(run.is_best(value))
        if found[-1]:
            checkpoint.begin(run.best)
            checkpoint.commit(run.best, {"driver": {"steps_done": step, "value": value}})
    run.close()
    assert found == [True, True, False, True, False, True]


def test_what_interrupted_writes_and_deletions_left_of_checkpoints_is_dropped(tmp_path: Path) -> None:
    config = compose(overrides=[f"runs={tmp_path}"])
    run = RunDirectory(config, "0")
    run.close()
    for name in (".step-4.partial", ".step-2.deleted"):
        (run.checkpoints / name / "zero").mkdir(parents=True)
    (run.checkpoints / "notes").mkdir()
    RunDirectory(config, "0", resume=True).close()
    assert [path.name for path in run.checkpoints.iterdir()] == ["notes"]


def test_a_best_policy_that_the_run_ended_before_keeping_is_known(tmp_path: Path) -> None:
    run = RunDirectory(compose(overrides=[f"runs={tmp_path}"]), "0")

    def save(path: Path, **driver: float) -> None:
        checkpoint.begin(path)
        checkpoint.commit(path, {"driver": driver})

    unkept = [run.unkept_best()]
    for step, value in ((2, 0.25), (4, 0.5)):
        save(run.checkpoints / f"step-{step}", steps_done=step, value=value)
        unkept.append(run.unkept_best())
        if step == 2:
            save(run.best, steps_done=step, value=value)
            unkept.append(run.unkept_best())
    save(run.checkpoints / "step-5", steps_done=5)
    unkept.append(run.unkept_best())
    run.close()
    first, last = ({"steps_done": step, "value": value} for step, value in ((2, 0.25), (4, 0.5)))
    assert unkept == [None, first, None, last, None]


def test_tensorboard_shows_steps_that_are_logged_again_once(tmp_path: Path) -> None:
    config = compose(overrides=[f"runs={tmp_path}"])
    run = RunDirectory(config, "0")
    run.log("sft", 1, {"loss": 9.0})
    for step in (1, 2, 3):
        run.log("train", step, {"loss": float(step)})
    run.close()
    time.sleep(1.1)  # TensorBoard orders files by the second
    run = RunDirectory(config, "0", resume=True)
    run.go_on_after(2)
    run.log("train", 3, {"loss": 30.0})
    run.close()
    shown = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [event.value for event in shown.Scalars("sft/loss")] == [9.0]


def test_tensorboard_keeps_epochs_of_a_higher_number_than_the_steps_of_a_resumed_run(tmp_path: Path) -> None:
    config = compose(overrides=[f"runs={tmp_path}"])
    run = RunDirectory(config, "0")
    for epoch in (1, 2, 3):
        run.log("sft", epoch, {"loss": 9.0 - epoch})
    run.log("train", 1, {"loss": 1.0})
    run.close()
    time.sleep(1.1)  # as above
    run = RunDirectory(config, "0", resume=True)
    run.go_on_after(1)
    run.log("train", 2, {"loss": 2.0})
    run.close()
    shown = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("sft/loss")] == [1, 2, 3]


def test_a_run_that_is_a_link_is_replaced_and_what_it_links_to_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "default").symlink_to(tmp_path / "elsewhere")
    run = RunDirectory(compose(overrides=[f"runs={tmp_path / 'runs'}"]), "0", overwrite=True)
    run.close()
    assert not run.path.is_symlink()
    assert (tmp_path / "elsewhere" / "kept").is_file()
    assert {path.name for path in run.path.parent.iterdir()} == {"default"}


def test_a_link_that_leads_nowhere_takes_the_name_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "default").symlink_to(tmp_path / "unmounted")
    config = compose(overrides=[f"runs={tmp_path}"])
    with pytest.raises(ConfigError, match="OVERWRITE=1 replaces it"):
        RunDirectory.check(config, resume=False, overwrite=False)
    run = RunDirectory(config, "0", overwrite=True)
    run.close()
    assert run.path.is_dir()
    assert not run.path.is_symlink()


def test_a_run_in_use_is_refused(tmp_path: Path, refused: Refused) -> None:
    config = compose(overrides=[f"runs={tmp_path / 'runs'}"])
    (tmp_path / "runs").mkdir()
    lock_file(config).write_text("12345678 on a machine that has died")
    with in_use(config):
        message = refused("train", f"runs={tmp_path / 'runs'}")
    assert f"is in use by process {os.getpid()} on {socket.gethostname()}: wait" in message


def test_a_run_needs_no_locks_where_the_file_system_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, raised in ((errno.ENOLCK, nullcontext()), (errno.EIO, pytest.raises(OSError, match="lock"))):
        monkeypatch.setattr("launch.run_directory.fcntl.flock", Mock(side_effect=OSError(code, "lock")))
        with raised, in_use(compose(overrides=[f"runs={tmp_path}"])):
            pass


def test_a_run_may_not_end_before_the_steps_it_has_done(tmp_path: Path) -> None:
    config = compose(overrides=[f"runs={tmp_path}"])
    (tmp_path / "default" / "checkpoints" / "step-4").mkdir(parents=True)
    RunDirectory.check_steps(config, 4)
    with pytest.raises(ConfigError, match=r"train\.steps=3: run default has done 4 steps; give STEPS=4 or more"):
        RunDirectory.check_steps(config, 3)


def test_a_run_of_the_same_name_is_kept(data: Path, tmp_path: Path, refused: Refused) -> None:
    RunDirectory(compose(data=str(data), overrides=["name=mine"]), "0").close()
    message = refused("train", "--data", str(data), "--name", "mine")
    assert "RESUME=1" in message
    assert "OVERWRITE=1" in message
    (tmp_path / "runs" / "other" / "checkpoints").mkdir(parents=True)
    assert "runs/other exists and is no run" in refused("train", "--data", str(data), "--name", "other")


def test_a_run_is_replaced_only_when_the_new_one_can_start(data: Path, tmp_path: Path, refused: Refused) -> None:
    kept = tmp_path / "runs" / "mine" / "checkpoints"
    kept.mkdir(parents=True)
    message = refused("train", "--data", str(data), "--name", "mine", "--overwrite", "rewards=[{name: rul}]")
    assert "rul" in message
    assert kept.is_dir()


def test_what_is_no_run_is_not_deleted(data: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "runs" / "thesis").mkdir(parents=True)
    (tmp_path / "runs" / "thesis" / "thesis.txt").write_text("years")
    message = refused("train", "--data", str(data), "--name", "thesis", "--overwrite")
    assert "is not the folder of a run" in message
    assert (tmp_path / "runs" / "thesis" / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("left", [[], ["catalogue.json"], ["config.yaml", "rollouts"]])
def test_what_a_run_has_left_that_did_not_get_far_is_replaced(left: list[str], tmp_path: Path) -> None:
    config = compose(overrides=[f"runs={tmp_path}"])
    (tmp_path / "default").mkdir()
    for name in left:
        (tmp_path / "default" / name).touch()
    (tmp_path / ".default.deleted" / "rollouts").mkdir(parents=True)  # of a deletion that was interrupted
    RunDirectory(config, "0", overwrite=True).close()
    assert {path.name for path in tmp_path.iterdir()} == {"default"}
