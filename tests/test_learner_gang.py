"""The gang of learner ranks: whose error it is, and what a restart does."""

import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import ray
from ray import cloudpickle

from launch.learner_gang import LearnerGang, LearnerLost
from launch.progress import Progress
from launch.run import GANG_RESTARTS, surviving
from learner import checkpoint
from learner.config import LearnerConfig
from learner.mismatch import MismatchError
from learner.rank import PEER_LOST, LearnerRank

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors' processes cannot import tests


class Rank:
    """A rank without a model; `faults` beside the model path names who fails in what, and how."""

    def __init__(self, rank: int, ranks: int, model_path: str, *rest: Any) -> None:
        self.rank, self.folder = rank, Path(model_path)

    def address(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def join(self, host: str, port: int, ranks_here: int) -> None:
        assert ranks_here == 2
        self._fail_if_asked("join")

    def export_weights(self) -> Iterator[str]:
        if self.rank == 0:
            yield "first bucket"
        self._fail_if_asked("export_weights")
        if self.rank == 0:
            yield "second bucket"

    def weights_checksum(self) -> int:
        return 7

    def save_checkpoint(self, path: str, state: dict[str, Any], keep: int | None) -> None:
        if self.rank == 0:
            checkpoint.begin(Path(path))
            self._fail_if_asked("save_checkpoint")
            shutil.rmtree(path, ignore_errors=True)
            checkpoint.temporary_path(Path(path)).rename(path)

    def load_checkpoint(self, path: str) -> dict[str, Any]:
        return {"read from": path}

    def step(self, *tables: Any) -> dict[str, float]:
        told = self.folder / "mismatch"
        return {"process": float(os.getpid()), "mismatch": float(told.read_text()) if told.exists() else 0.0}

    def _fail_if_asked(self, where: str) -> None:
        fault = self.folder / f"{where}-{self.rank}"
        if not fault.exists():
            return
        how = fault.read_text()
        if "once" in how:
            fault.unlink()
        if "die" in how:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError(how)


@pytest.fixture
def gang(ray_session: None, tmp_path: Path) -> Iterator[LearnerGang]:
    config: Any = SimpleNamespace(
        cluster=SimpleNamespace(start_timeout_s=30.0),
        learner=LearnerConfig(timeout_s=30.0),
        rollout=SimpleNamespace(logprob_space="vocabulary"),
        train=SimpleNamespace(staleness=0, seed=0),
    )
    catalog: Any = SimpleNamespace(path=tmp_path)
    rank_class: Any = ray.remote(Rank)
    gang = LearnerGang(config, catalog, tmp_path, [{"num_cpus": 0}] * 2, 1, rank_class)
    yield gang
    gang.close()


def test_the_port_where_ranks_meet_is_held_until_they_do(ray_session: None) -> None:
    rank = LearnerRank.options(num_cpus=0).remote(0, 1, "no model", "no catalogue", LearnerConfig())  # type: ignore[attr-defined]
    address = ray.get(rank.address.remote())
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(address)
    ray.kill(rank)


def test_the_buckets_of_rank_0_are_what_is_published(gang: LearnerGang) -> None:
    gang.join()
    weights = gang.export(version=3)
    assert (weights.version, weights.checksum) == (3, 7)
    assert ray.get(weights.bucket_refs) == ["first bucket", "second bucket"]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_export_that_fails_on_any_rank_is_not_published(gang: LearnerGang, tmp_path: Path, rank: int) -> None:
    (tmp_path / f"export_weights-{rank}").write_text("no memory")
    (tmp_path / f"export_weights-{1 - rank}").write_text(PEER_LOST)
    gang.join()
    with pytest.raises(RuntimeError, match="no memory"):
        gang.export(version=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_in_an_export_is_named(gang: LearnerGang, tmp_path: Path, rank: int) -> None:
    (tmp_path / f"export_weights-{rank}").write_text("die")
    gang.join()
    with pytest.raises(LearnerLost, match=f"rank {rank} on 127.0.0.1 died during 'export_weights'"):
        gang.export(version=0)


def test_a_step_on_groups_of_another_policy_ends_the_run_where_none_is_allowed(
    gang: LearnerGang, tmp_path: Path
) -> None:
    gang.join()
    (tmp_path / "mismatch").write_text("0.2")
    with pytest.raises(MismatchError, match=r"differ by 0\.2 on average \(learner\.mismatch_limit=0\.1\)"):
        gang.step([])
    for section, name, value in (("train", "staleness", 1), ("learner", "mismatch_limit", 0.3)):
        allowed = getattr(gang._config, section)
        before = getattr(allowed, name)
        setattr(allowed, name, value)
        assert gang.step([])["mismatch"] == 0.2
        setattr(allowed, name, before)
    (tmp_path / "mismatch").write_text("nan")
    with pytest.raises(MismatchError):
        gang.step([])


def test_a_rank_without_a_place_is_named(gang: LearnerGang) -> None:
    gang._config.cluster.start_timeout_s = 15.0
    gang._rank_options = [{"num_cpus": 0}, {"num_cpus": 0, "resources": {"of a node that died": 1}}]
    gang.restart()
    waited = r"ranks \[1\] have not started within cluster\.start_timeout_s=15 s; .*room"
    with pytest.raises(LearnerLost, match=waited):
        gang.join()


def test_a_checkpoint_is_read_only_where_the_ranks_hold_something_else(gang: LearnerGang, tmp_path: Path) -> None:
    gang.join()
    gang.save(tmp_path / "a", {"steps_done": 1})
    assert gang.load(tmp_path / "a") == {"steps_done": 1}
    assert gang.load(tmp_path / "b") == {"read from": str(tmp_path / "b")}
    assert gang.load(tmp_path / "a") == {"read from": str(tmp_path / "a")}
    gang.step([])
    assert gang.load(tmp_path / "a") == {"read from": str(tmp_path / "a")}
    gang.save(tmp_path / "a", {"steps_done": 2})
    gang.restart()
    gang.join()
    assert gang.load(tmp_path / "a") == {"read from": str(tmp_path / "a")}


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(gang: LearnerGang, tmp_path: Path) -> None:
    gang.join()
    (tmp_path / "save_checkpoint-0").write_text("No space left on device")
    with pytest.raises(RuntimeError, match="No space left on device"):
        gang.save(tmp_path / "runs/step-1", {"steps_done": 1})
    assert not any((tmp_path / "runs").iterdir())


def test_ranks_that_are_lost_while_they_start_again_are_started_once_more(gang: LearnerGang, tmp_path: Path) -> None:
    (tmp_path / "join-0").write_text("die once")
    (tmp_path / "join-1").write_text("die once")
    rollouts = SimpleNamespace(abandon=lambda: None)
    actors: Any = SimpleNamespace(learner=gang, rollouts=rollouts)
    assert surviving(actors, Progress(), lambda: "done") == "done"
    attempts = []

    def lose_all() -> NoReturn:
        attempts.append(gang.step([])["process"])
        raise LearnerLost("rank 0 died")

    with pytest.raises(LearnerLost):
        surviving(actors, Progress(), lose_all)
    assert len(set(attempts)) == 1 + GANG_RESTARTS  # other processes each time
