"""A run goes on from a checkpoint as if nothing had happened, and never from a damaged one."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import learner_gang
import numpy as np
import pytest
import ray
import torch
from learner_gang import assert_same_training
from ray.exceptions import RayError
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from catalog.atomic import CannotWrite
from launch.learner_gang import _blame
from learner import checkpoint
from learner.checkpoint import CheckpointError
from learner.config import LearnerConfig, LoraConfig, OptimizerConfig
from learner.export import save_huggingface
from learner.lost_peer import Rank0Failed
from learner.rank import PEER_LOST, LearnerRank, _error

gangs, learner_data = learner_gang.gangs, learner_gang.learner_data
CONFIG = LearnerConfig(
    beta=0.05,
    micro_batch_tokens=600,
    zero_stage=2,
    threads=1,
    reference_sync_every=2,
    lora=LoraConfig(rank=4, dropout=0.1),  # dropout, so that random number generators matter
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0),
    timeout_s=120.0,
)


def write(folder, name, content=b"weights", keep=None):
    """A checkpoint of one file and of a state."""
    temporary = checkpoint.begin(folder / name)
    (temporary / "model.safetensors").write_bytes(content)
    checkpoint.commit(folder / name, {"content": content.decode()}, keep)
    return folder / name


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path):
    temporary = checkpoint.begin(tmp_path / "step-1")
    (temporary / "model.safetensors").write_bytes(b"half of i")
    assert checkpoint.latest(tmp_path) is None
    path = write(tmp_path, "step-1")
    assert checkpoint.latest(tmp_path) == path
    assert checkpoint.read_state(path) == {"content": "weights"}
    assert not checkpoint.temporary_path(path).exists()


def test_whoever_may_read_a_checkpoint_may_read_all_of_it(tmp_path):
    temporary = checkpoint.begin(tmp_path / "step-1")
    (temporary / "model.safetensors").touch(mode=0o600)  # as safetensors does
    before = os.umask(0o027)
    checkpoint.commit(tmp_path / "step-1", {})
    os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "step-1").iterdir()} == {0o640}


def test_the_newest_are_kept_by_number(tmp_path):
    (tmp_path / "step-200").touch()
    (tmp_path / "step-12-of-mine").mkdir()
    for step in (9, 10, 11, 100):
        write(tmp_path, f"step-{step}", keep=2)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-100", "step-11"]


def test_a_step_that_is_done_again_replaces_its_checkpoint(tmp_path):
    write(tmp_path, "step-1")
    (tmp_path / ".step-1.deleted" / "zero").mkdir(parents=True)  # what an interrupted removal has left
    assert checkpoint.read_state(write(tmp_path, "step-1", b"again")) == {"content": "again"}
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_checkpoint_stands_until_the_one_that_replaces_it_does(tmp_path, monkeypatch):
    best = write(tmp_path, "best")

    def killed(path, ignore_errors=False):
        if path.name.endswith(".deleted") and path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "best", b"better")
    assert checkpoint.read_state(best) == {"content": "better"}
    assert checkpoint.find_fault(best) is None


def test_what_interrupted_writes_removals_and_conversions_left_is_swept(tmp_path):
    write(tmp_path, "step-1")
    for left in ("partial", "deleted", "universal"):
        (tmp_path / f".step-1.{left}" / "zero").mkdir(parents=True)
    checkpoint.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_write_that_failed_leaves_nothing(tmp_path):
    (checkpoint.begin(tmp_path / "step-1") / "model.safetensors").write_bytes(b"half of i")
    checkpoint.discard(tmp_path / "step-1")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("written", ["torch.save(tensors, path)", "safetensors.torch.save_file(tensors, path)"])
def test_a_full_disk_is_told_by_the_name_of_what_was_to_be_written(tmp_path, written):
    """A file may not become larger than the limit, which Python answers with an error in place of a signal."""
    script = (
        "import resource, sys, torch, safetensors.torch; from pathlib import Path\n"
        "from learner.checkpoint import writing_tensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "path, tensors = Path(sys.argv[1]), {'a': torch.zeros(2**20)}\n"
        f"with writing_tensors(path): {written}"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "zero.pt")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert f"CannotWrite: {tmp_path}/zero.pt cannot be written; is the disk full?" in run.stderr


def test_another_error_of_torch_stays_what_it_is():
    with pytest.raises(RuntimeError, match="must match"), checkpoint.writing_tensors(Path("zero.pt")):
        torch.zeros(2) + torch.zeros(3)


def test_a_checkpoint_whose_removal_is_interrupted_is_none(tmp_path, monkeypatch):
    old = write(tmp_path, "step-1")

    def interrupted(path, ignore_errors=False):
        if path.exists():
            (path / "model.safetensors").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "step-2", keep=1)
    assert not old.exists()
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-2"]


def test_a_checkpoint_that_has_the_name_of_another_step_is_refused(tmp_path):
    for step in (1, 2):
        temporary = checkpoint.begin(tmp_path / f"step-{step}")
        (temporary / "model.safetensors").write_bytes(b"weights")
        checkpoint.commit(tmp_path / f"step-{step}", {"driver": {"steps_done": step}})
    checkpoint.check(tmp_path / "step-2")
    (tmp_path / "step-2").rename(tmp_path / "step-9")
    with pytest.raises(CheckpointError, match=r"step-9: it is that of step 2 by its state\.json: name it step-2"):
        checkpoint.check(tmp_path / "step-9")


def test_a_tokenizer_that_is_gone_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("learner.export.named_weights", lambda engine, model: [])
    with pytest.raises(CannotWrite, match=r"step-1: the tokenizer that belongs to it was in .*gone, which is gone"):
        save_huggingface(SimpleNamespace(rank=0), None, str(tmp_path / "gone"), tmp_path / "step-1")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: (path / "model.safetensors").write_bytes(b"weighty"), "model.safetensors is damaged"),
        (lambda path: (path / "model.safetensors").write_bytes(b"weig"), "model.safetensors has 4 bytes instead of 7"),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda path: (path / "state.json").unlink(), "state.json is missing"),
        *(
            (
                lambda path, text=text: (path / "manifest.json").write_text(text),
                "manifest.json is missing or not readable",
            )
            for text in ("{", "{}", "[]", "null", '{"state.json": {}}')
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(tmp_path, damage, named):
    write(tmp_path, "step-1")
    path = write(tmp_path, "step-2")
    checkpoint.check(path)
    damage(path)
    with pytest.raises(checkpoint.CheckpointError, match=f"step-2: {named}.*step-1 is intact: delete step-2"):
        checkpoint.check(path)


@pytest.mark.parametrize(("file", "fault"), [("state.json", "is damaged"), ("model.safetensors", None)])
def test_only_the_state_is_read_where_contents_can_wait(tmp_path, file, fault):
    path = write(tmp_path, "step-1")
    size = (path / file).stat().st_size
    (path / file).write_bytes(b"x" * size)
    found = checkpoint.find_fault(path, contents=False)
    assert fault in found if fault else found is None


def test_when_all_are_damaged_none_is_offered(tmp_path):
    path = write(tmp_path, "step-1")
    (path / "state.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"no other is intact$"):
        checkpoint.check(path)
    write(tmp_path, "sft")
    with pytest.raises(CheckpointError, match=r"no other is intact: delete all step-N to go on from .*sft$"):
        checkpoint.check(path)


class Ranks:
    """Real learner ranks."""

    def __init__(self, config, data):
        self.ranks = [
            LearnerRank.options(num_cpus=0).remote(
                rank, config.ranks, str(data.model_path), str(data.catalog.path), config, total_steps=6
            )
            for rank in range(config.ranks)
        ]
        host, port = ray.get(self.ranks[0].address.remote())
        self.all("join", host, port, config.ranks)

    def all(self, method, *arguments):
        return ray.get([getattr(rank, method).remote(*arguments) for rank in self.ranks])

    def close(self):
        for rank in self.ranks:
            ray.kill(rank)


@pytest.fixture(scope="module")
def interrupted(ray_session, learner_data, tmp_path_factory):
    """Six steps of two ranks: their weights, the checkpoint after the third, and the error when a rank was killed."""
    config = replace(CONFIG, ranks=2)
    steps = [learner_data.tables(step) for step in range(6)]
    path = tmp_path_factory.mktemp("checkpoints") / "step-3"

    ranks = Ranks(config, learner_data)
    pids = [ray.get(rank.__ray_call__.remote(lambda _: os.getpid())) for rank in ranks.ranks]
    for tables in steps[:3]:
        ranks.all("step", *tables)
    ranks.all("save_checkpoint", str(path), {"step": 3})
    for tables in steps[3:]:
        ranks.all("step", *tables)
    weights = ranks.all("weights_checksum")[0]
    ranks.all("save_huggingface", str(path.with_name("uninterrupted")))

    long_step = [table for tables in steps * 40 for table in tables]
    busy = [rank.step.remote(*long_step) for rank in ranks.ranks]
    time.sleep(1.0)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(RayError) as survivor:
        ray.get(busy[0], timeout=60)
    ranks.close()
    return {"steps": steps, "path": path, "weights": weights, "error": str(survivor.value)}


def resumed(config, data, interrupted):
    """Ranks that went on from the checkpoint to the sixth step."""
    ranks = Ranks(config, data)
    assert ranks.all("load_checkpoint", str(interrupted["path"])) == [{"step": 3}] * config.ranks
    for tables in interrupted["steps"][3:]:
        ranks.all("step", *tables)
    return ranks


def test_the_survivor_of_a_killed_rank_says_so_at_once(interrupted):
    assert "learner rank 0 of 2 failed in step" in interrupted["error"]
    assert PEER_LOST in interrupted["error"]


def test_three_steps_a_kill_and_three_equal_six_bit_for_bit(interrupted, learner_data):
    ranks = resumed(replace(CONFIG, ranks=2), learner_data, interrupted)
    assert ranks.all("weights_checksum") == [interrupted["weights"]] * 2
    ranks.close()


@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_another_number_of_ranks_goes_on_too(gangs, learner_data, tmp_path, stage, writers, readers):
    config = replace(CONFIG, zero_stage=stage, lora=LoraConfig(), optimizer=OptimizerConfig(learning_rate=1e-3))
    steps = [learner_data.tables(step) for step in range(4)]
    path = str(tmp_path / "step-2")
    expected = gangs[writers]("train", config, steps, save_at=(2, path))
    found = gangs[readers]("train", config, steps, load_at=(2, path))
    assert_same_training(found["weights"], expected["weights"], learner_data)
    assert_same_training(found["reference"], expected["reference"], learner_data)
    assert found["metrics"][-1]["lr"] == expected["metrics"][-1]["lr"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-2"]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_reference_of_adapters_goes_on_bit_for_bit(gangs, learner_data, tmp_path, stage):
    config = replace(CONFIG, zero_stage=stage, reference_sync_alpha=1.0)
    steps = [learner_data.tables(step) for step in range(5)]
    path = tmp_path / "step-3"
    expected = gangs[2]("train", config, steps, save_at=(3, str(path)))
    found = gangs[2]("train", config, steps, load_at=(3, str(path)))
    for mine, theirs in zip(found["metrics"], expected["metrics"][3:], strict=True):
        assert [mine[name] for name in ("loss", "kl", "grad_norm")] == [
            theirs[name] for name in ("loss", "kl", "grad_norm")
        ]
    for part in ("weights", "reference"):
        assert found[part].keys() == expected[part].keys()
        assert all(np.array_equal(found[part][name], weight) for name, weight in expected[part].items())
    assert all(".lora_" in name for name in load_file(path / checkpoint.REFERENCE))


def test_a_checkpoint_of_another_kind_is_refused_by_name(gangs, learner_data, tmp_path):
    config, path = replace(CONFIG, lora=LoraConfig()), str(tmp_path / "step-1")
    steps = [learner_data.tables(0)]
    gangs[1]("train", config, steps, save_at=(1, path))
    with pytest.raises(RayError, match=r"learner\.zero_stage is 1, but .*step-1 was written with 2"):
        gangs[1]("train", replace(config, zero_stage=1), steps, load_at=(1, path))


def test_a_policy_with_sampling_defaults_that_transformers_would_not_save_has_checkpoints(
    gangs, learner_data, tmp_path
):
    sampling = {"temperature": 0.9, "top_p": 0.6}
    model = learner_gang.with_settings(learner_data.model_path, tmp_path / "given", "generation_config.json", sampling)
    steps = [learner_data.tables(step) for step in range(2)]
    path = tmp_path / "step-1"
    whole = gangs[1]("train", CONFIG, steps, save_at=(1, str(path)), model_path=str(model))
    rest = gangs[1]("train", CONFIG, steps, load_at=(1, str(path)), model_path=str(model))
    assert rest["checksum"] == whole["checksum"]
    AutoModelForCausalLM.from_pretrained(path).generation_config.validate(strict=True)


def test_a_checkpoint_is_a_hugging_face_directory(interrupted):
    model = AutoModelForCausalLM.from_pretrained(interrupted["path"])
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert AutoTokenizer.from_pretrained(interrupted["path"]).eos_token_id is not None


def test_the_rank_whose_own_error_it_is_gets_the_blame() -> None:
    zero, one = (SimpleNamespace(_rank=rank, _world_size=2) for rank in (0, 1))
    own = _error(zero, "load_checkpoint", CheckpointError("checkpoint step-2: damaged; step-1 is intact"))
    follower = _error(one, "load_checkpoint", Rank0Failed("its own error says why"))
    assert _blame("resume", {1: follower, 0: own}, ["a", "b"]) is own
