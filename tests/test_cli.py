"""The command line as a user meets it: bad input ends at once with one line that says what to do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import Refused

from catalog.build import build_catalog
from launch.cli import main
from launch.compose import compose
from launch.run_directory import RunDirectory

REPOSITORY = Path(__file__).resolve().parent.parent


def test_a_missing_file_is_named(data: Path, refused: Refused) -> None:
    (data / "valid.parquet").unlink()
    assert "valid.parquet" in refused("train", "--data", str(data))


def test_an_unknown_item_in_a_history_is_named(data: Path, refused: Refused) -> None:
    table = pq.read_table(data / "train.parquet").to_pydict()
    table["history"][7] = [3, 999]
    pq.write_table(pa.table(table), data / "train.parquet")
    message = refused("train", "--data", str(data))
    assert "train.parquet" in message
    assert "999" in message


def test_an_empty_title_is_named(data: Path, refused: Refused) -> None:
    table = pq.read_table(data / "items.parquet").to_pydict()
    table["title"][5] = ""
    pq.write_table(pa.table(table), data / "items.parquet")
    message = refused("train", "--data", str(data))
    assert "items.parquet" in message
    assert "5" in message


def test_a_model_without_end_of_sequence_is_refused(
    data: Path, tiny_model_dir: Path, tmp_path: Path, refused: Refused
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).is_file():
            content = json.loads((model / name).read_text())
            content["eos_token"] = None
            (model / name).write_text(json.dumps(content))
    assert "end-of-sequence" in refused("train", "--data", str(data), "--model", str(model))


def test_an_unknown_reward_is_named_before_anything_starts(data: Path, refused: Refused) -> None:
    message = refused("train", "--data", str(data), "rewards=[{name: no_such_reward}]")
    assert "no_such_reward" in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"is_encoder_decoder": True}, "no causal language model"), ({"architectures": ["BertForMaskedLM"]}, "BertFor")],
)
def test_a_model_that_cannot_write_titles_is_named(
    data: Path, tiny_model_dir: Path, tmp_path: Path, refused: Refused, change: dict, reason: str
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | change))
    assert reason in refused("train", "--data", str(data), "--model", str(model))


@pytest.mark.parametrize("held", [b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", None])
def test_weights_that_are_not_there_in_whole_are_named(
    data: Path, tiny_model_dir: Path, tmp_path: Path, refused: Refused, held: bytes | None
) -> None:
    weights = shutil.copytree(tiny_model_dir, tmp_path / "model") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2] if held is None else held)
    for more in ([], ["--dry-run"]):
        message = refused("train", "--data", str(data), "--model", str(weights.parent), *more)
        assert f"model {weights.parent}: model.safetensors has no weights in it, or not all" in message


def test_an_option_that_is_not_known_is_refused_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--naem", "mine", "--dry-run"])
    shown = capsys.readouterr().err
    assert "unrecognized arguments: --naem" in shown
    assert "--name" in shown


@pytest.mark.parametrize("option", ["cluster", "data", "model", "algorithm", "name"])
def test_an_empty_option_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a variable of the shell that is not set; the default would be trained, and with --overwrite replaced."""
    with pytest.raises(SystemExit):
        main(["train", f"--{option}", "", "--dry-run"])
    assert f"--{option} is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--dry-run", "--data"),
        ("train", "--dry-run", "--model"),
        ("train", "--dry-run", "--algorithm"),
        ("evaluate",),
        ("compare",),
        ("prepare", "data/train.parquet", "data/items.parquet"),
    ],
)
def test_a_path_that_cannot_be_looked_at_is_named(command: tuple[str, ...], data: Path, refused: Refused) -> None:
    path = "x" * 300
    message = refused(*command, path)
    assert path in message
    assert "File name too long" in message


def test_adapters_alone_are_no_model(data: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge_and_unload" in refused("train", "--data", str(data), "--model", str(tmp_path))


def test_a_profile_without_its_gpus_is_refused(refused: Refused) -> None:
    message = refused("train", "--cluster", "8xA100")
    assert "8 GPU (found 0)" in message


def test_what_cannot_be_recommended_is_refused(data: Path, tmp_path: Path, refused: Refused) -> None:
    assert "run runs/ghost does not exist" in refused("recommend", "runs/ghost", "Acme Bolt M1, Steel")
    RunDirectory(compose(data=str(data), overrides=["name=mine"]), "none").close()
    assert "has no checkpoint yet" in refused("recommend", "runs/mine", "Acme Bolt M1, Steel")
    (tmp_path / "runs/mine/checkpoints/sft").mkdir()
    for name in ("step-3", "..", "", "/tmp"):
        assert f"has no {name}, only sft" in refused("recommend", "runs/mine", "Acme Bolt", "--checkpoint", name)
    (tmp_path / "runs/mine/checkpoints/step-1").mkdir()
    assert "step-1: manifest.json is missing" in refused("recommend", "runs/mine", "Acme Bolt")
    assert "give the titles of one history" in refused("recommend", "runs/mine")
    assert "give the titles of one history" in refused("recommend", "runs/mine", "Acme Bolt", "--file", "histories")
    assert "a title of the command line is empty" in refused("recommend", "runs/mine", "Acme Bolt", " ")
    assert "--count must be 1 or more" in refused("recommend", "runs/mine", "Acme Bolt", "--count", "0")
    (tmp_path / "histories").write_text('["Acme Bolt M1, Steel"]\n[]\n')
    assert "histories, line 2: a list of titles" in refused("recommend", "runs/mine", "--file", "histories")
    (tmp_path / "histories").write_text("")
    assert "histories is empty" in refused("recommend", "runs/mine", "--file", "histories")


def test_what_cannot_be_compared_is_refused(data: Path, refused: Refused) -> None:
    assert "there is no run" in refused("compare", "runs/ghost")
    RunDirectory(compose(data=str(data), overrides=["name=mine"]), "none").close()
    assert "only finished runs can be compared" in refused("compare", "runs/mine")
    assert "there is no run runs/ghost" in refused("compare", "runs/ghost", "runs/mine")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        *(("summary.json", change) for change in (None, [], {"metrics": {"sft": None, "rl": {}}}, {"timing_s": {}})),
        *(("eval-rl.json", change) for change in (None, [], {"hit_ranks": [1]}, {"example_ids": [0, 99_999]})),
    ],
)
def test_a_damaged_file_of_a_run_that_is_compared_is_named(
    data: Path, tiny_model_dir: Path, refused: Refused, file: str, change: Any
) -> None:
    config = compose(data=str(data), overrides=["name=mine"])
    catalog = build_catalog(config.data, str(tiny_model_dir))
    run = RunDirectory(config, catalog.fingerprint)
    run.close()
    metrics = {f"ndcg@{k}": 0.5 for k in config.train.eval_ks}
    whole = {
        "summary.json": {
            "metrics": {"sft": metrics, "rl": metrics},
            "model": "m",
            "steps": 1,
            "timing_s": {"step": 1},
        },
        "eval-rl.json": {"example_ids": [0, 1], "hit_ranks": [0, -1]},
    }
    for name, content in whole.items():
        run.write_json(name, content)
    assert main(["compare", "runs/mine", "runs/mine"]) == 0
    run.write_json(file, {**whole[file], **change} if isinstance(change, dict) else change or {})
    assert f"mine/{file} is damaged" in refused("compare", "runs/mine", "runs/mine")


def test_a_sasrec_model_needs_a_file_before_it_is_trained(data: Path, refused: Refused) -> None:
    command = ("reward", "train-sasrec", "--data", str(data), "--out")
    assert "OUT=data is a folder; name a file in it" in refused(*command, "data")
    assert "data/items.parquet/s cannot be written" in refused(*command, "data/items.parquet/s")
    assert "hidden=30, layers=2 and heads=4 must be 1" in refused(*command, "s", "--hidden", "30", "--heads", "4")


def test_metrics_that_could_not_be_written_are_not_computed(data: Path, refused: Refused) -> None:
    message = refused("evaluate", "runs/mine", "--out", "data/items.parquet/metrics.json")
    assert "data/items.parquet/metrics.json cannot be written" in message


@pytest.mark.parametrize("unbuffered", [True, False])
def test_a_reader_that_has_enough_ends_the_command_without_a_word(tmp_path: Path, unbuffered: bool) -> None:
    command = f"{sys.executable} -m launch.cli train --dry-run | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    ended = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (141, "", "")


@pytest.mark.parametrize("closed", ["<&- >&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(tmp_path: Path, closed: str) -> None:
    command = f"exec {sys.executable} -m launch.cli keys train.seed {closed}"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_broken_pipe_of_something_else_is_an_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("launch.run.run", broken)
    with pytest.raises(BrokenPipeError):
        main(["train", "--data", str(data)])


@pytest.mark.parametrize(("name", "offline"), [("rule", "1"), ("my_rewards:Judge", None)])
def test_only_what_fetches_nothing_is_kept_off_the_hub(
    name: str, offline: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    found = []
    monkeypatch.setattr("launch.run.run", lambda *_, **__: found.append(os.environ.get("HF_HUB_OFFLINE")))
    assert main(["train", f"rewards=[{{name: {name}}}]"]) == 0
    assert found == [offline]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_help_of_rewards_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", "--help"]) == 0
    assert "rere reward check SPEC" in capsys.readouterr().out
    assert main(["reward", "chek"]) == 2
