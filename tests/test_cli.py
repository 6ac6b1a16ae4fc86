"""The command line as a user meets it: bad input ends at once with one line that says what to do."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from catalog.build import build_catalog
from catalog.config import DataConfig
from launch.cli import main
from launch.config import ConfigError, compose
from launch.run_directory import RunDirectory, in_use

REPOSITORY = Path(__file__).resolve().parent.parent
Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must fail; the single line of its error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        assert main(arguments) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


class NothingStarts(Exception):
    """Raised in place of starting actors."""


def start_nothing(*arguments: object) -> None:
    raise NothingStarts


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a small valid catalogue."""
    folder = tmp_path / "data"
    folder.mkdir()
    items = {"item_id": list(range(40)), "title": [f"Acme Bolt M{i}, Steel" for i in range(40)]}
    pq.write_table(pa.table(items), folder / "items.parquet")
    for split, rows in (("train", 40), ("valid", 10), ("test", 10)):
        examples = {
            "user_id": [f"u{i}" for i in range(rows)],
            "history": [[i % 40, (i + 1) % 40] for i in range(rows)],
            "target": [(i + 2) % 40 for i in range(rows)],
            "timestamp": list(range(rows)),
        }
        pq.write_table(pa.table(examples), folder / f"{split}.parquet")
    return folder


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


@pytest.mark.parametrize("name", ["007", "1e3", "true", "${data.path}"])
def test_a_name_is_taken_as_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--name", name, "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["name"] == name


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
    RunDirectory(compose(overrides=["train.eval_beams=50"]), "0").close()
    assert main(["train", "--resume", "--dry-run", "train.eval_ks=[1,50]"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["eval_ks"] == [1, 50]


def test_a_runs_folder_that_cannot_be_is_named(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    assert "runs=file: no run can be written there" in refused("train", "runs=file")


def test_a_damaged_catalogue_file_is_named(tmp_path: Path) -> None:
    config = compose(overrides=[f"runs={tmp_path}"])
    RunDirectory(config, "0").close()
    for content in ("", "{}", "[1]"):
        (tmp_path / "default" / "catalogue.json").write_text(content)
        with pytest.raises(ConfigError, match=r"catalogue\.json is missing or damaged"):
            RunDirectory.check_catalogue(config, "0")


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


def test_steps_that_a_shorter_resumed_run_no_longer_has_do_not_count(tmp_path: Path) -> None:
    run = RunDirectory(compose(overrides=[f"runs={tmp_path}"]), "0")
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 4.0)):
        run.log("train", step, {"loss": loss})
    run.close()
    assert [line["loss"] for line in run.metrics("train", steps=2)] == [1.0, 4.0]


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


def test_a_run_in_use_is_refused(tmp_path: Path, refused: Refused) -> None:
    with in_use(compose(overrides=[f"runs={tmp_path / 'runs'}"])):
        assert f"is in use by process {os.getpid()}" in refused("train", f"runs={tmp_path / 'runs'}")


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


def test_a_profile_without_its_gpus_is_refused(refused: Refused) -> None:
    message = refused("train", "--cluster", "8xA100")
    assert "8 GPU (found 0)" in message


def test_a_dry_run_prints_placement_arithmetic_and_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--cluster", "8xA100", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "4 x rollout worker  2 CPU, 1 GPU" in printed
    assert "64 prompts -> 1024 candidates per step; steps, micro-batches" in printed
    assert "zero_stage: 2" in printed
    assert not (tmp_path / "runs").exists()


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
    assert "RL: 32 prompts -> 512 candidates per step, 32 prompts per rank in about" in printed
    assert "SFT: 128 examples per rank and update, 1 updates per epoch" in printed
    assert main([*command, "train.prompts_per_step=41"]) == 1
    assert "the training split has 40 examples" in capsys.readouterr().err
    assert main([*command, "learner.micro_batch_tokens=20"]) == 1
    assert "less than one prompt with one title" in capsys.readouterr().err


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
        (["learner.objective=no_such_module:loss"], "objective 'no_such_module:loss' cannot be imported"),
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
        (["model.hidden=64"], "model.hidden / model.heads = 16: the head size must be 32 or more"),
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


def test_a_run_of_the_same_name_is_kept(data: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    message = refused("train", "--data", str(data), "--name", "mine")
    assert "RESUME=1" in message
    assert "OVERWRITE=1" in message


def test_to_resume_and_to_replace_is_refused(data: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    assert "give one of them" in refused("train", "--data", str(data), "--name", "mine", "--resume", "--overwrite")


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


def test_what_a_run_without_steps_is_resumed_with_says_how_to_keep_its_warm_up(
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


def test_resuming_what_never_was_is_refused(refused: Refused) -> None:
    assert "nothing to resume" in refused("train", "--name", "ghost", "--resume")


def test_what_cannot_be_recommended_is_refused(data: Path, tmp_path: Path, refused: Refused) -> None:
    assert "run runs/ghost does not exist" in refused("recommend", "runs/ghost", "Acme Bolt M1, Steel")
    RunDirectory(compose(data=str(data), overrides=["name=mine"]), "none").close()
    assert "has no checkpoint step-N yet" in refused("recommend", "runs/mine", "Acme Bolt M1, Steel")
    (tmp_path / "runs/mine/checkpoints/sft").mkdir()
    assert "has no step-3, only sft" in refused("recommend", "runs/mine", "Acme Bolt", "--checkpoint", "step-3")
    assert "give the titles of one history" in refused("recommend", "runs/mine")
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
