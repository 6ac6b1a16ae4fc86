"""Objects that went with a node: every wait calls them lost, and the run repeats the steps since its checkpoint."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ObjectLostError

from launch.progress import Progress
from launch.run import surviving
from launch.waiting import fetch
from rewards.config import RewardTerm
from rewards.pool import RewardPool
from rewards.stage import Stage, Work
from rollout.config import RolloutConfig
from rollout.published_weights import PublishedWeights
from rollout.restarts import DataLost, bring_back
from rollout.streams import collect, stream_rollout

DEAD_RAYLET = """
import os, signal, subprocess
import ray
from launch.progress import Progress
from launch.run import surviving
from rollout.restarts import DataLost, RayLost

ray.init(address="local", include_dashboard=False, num_cpus=1, object_store_memory=10**8, log_to_driver=False)
raylet = subprocess.check_output(["pgrep", "-P", str(os.getpid()), "-f", "raylet/raylet"], text=True)
os.kill(int(raylet), signal.SIGKILL)

class Learner:
    def join(self):
        raise DataLost("the table")

class Actors:
    learner = Learner()

try:
    surviving(Actors(), Progress(), lambda: None)
except RayLost as error:
    print(error, flush=True)
os._exit(0)
"""


@ray.remote(num_cpus=0, max_retries=0)
def gone() -> None:
    raise ObjectLostError("00" * 28, None, "")


@ray.remote(num_cpus=0)
class Reader:
    """Stands for a rollout worker that loads weights, and whose second table is lost once."""

    def __init__(self) -> None:
        self._lost = False

    def ready(self) -> None:
        pass

    def health(self) -> None:
        pass

    def rollout(self, split: str, example_ids: list[int], *rest: Any) -> Iterator[int]:
        for example_id in example_ids:
            if example_id == 6 and not self._lost:
                self._lost = True
                raise ObjectLostError("00" * 28, None, "")
            yield example_id

    def load_weights(self, version: int, bucket_refs: list[ray.ObjectRef], checksum: int) -> int:
        return len(ray.get(bucket_refs))


@pytest.fixture
def lost(ray_session: None) -> ray.ObjectRef:
    """Stands for an object that no node holds any more; tests/test_nodes.py loses one with its node."""
    return gone.remote()


def test_a_table_that_is_lost_before_its_rewards_is_no_fault_of_a_reward(lost: ray.ObjectRef, tmp_path: Path) -> None:
    pool = RewardPool([RewardTerm("rule")], tmp_path).start()
    try:
        with pytest.raises(DataLost, match="lost with the node"):
            pool.result(pool.submit(lost, "train"))
        with pytest.raises(DataLost, match="lost with the node"):
            pool.metrics([lost])
    finally:
        pool.close()


def test_weights_that_are_lost_are_not_waited_for(lost: ray.ObjectRef) -> None:
    reader = Reader.remote()  # type: ignore[attr-defined]
    with pytest.raises(DataLost, match="lost with the node"):
        bring_back(reader, PublishedWeights(3, [lost], 0), 60.0, 60.0, "rollout worker 0")


def test_a_table_that_is_lost_before_it_is_collected_is_generated_again(ray_session: None) -> None:
    reader = Reader.remote()  # type: ignore[attr-defined]
    stream = stream_rollout(reader, 0, "train", [5, 6, 7], 0, 0, RolloutConfig(groups_per_table=1))
    assert [ray.get(table) for _, table in collect([stream], 60.0)] == [5, 6, 7]


def test_lost_data_are_made_again_from_the_last_checkpoint(lost: ray.ObjectRef) -> None:
    happened = []
    actors: Any = SimpleNamespace(
        learner=SimpleNamespace(join=lambda: None, restart=lambda: happened.append("restart")),
        rollouts=SimpleNamespace(abandon=lambda: happened.append("abandon")),
    )

    def work() -> str:
        return "done" if happened else fetch(lost, 60.0, "a table")

    assert surviving(actors, Progress(), work) == "done"
    assert happened == ["abandon", "restart"]


def test_a_late_reward_is_named_though_its_table_is_lost(lost: ray.ObjectRef) -> None:
    stage = SimpleNamespace(names="'slow'")
    late = Stage.late(stage, Work(SimpleNamespace(stage=stage, queue=[1]), lost, lost), waited_s=3.0)
    assert "reward 'slow' gave no answer for groups whose table is lost within 3 s" in str(late)


def test_nothing_is_started_again_where_ray_itself_has_died() -> None:
    done = subprocess.run([sys.executable, "-c", DEAD_RAYLET], capture_output=True, text=True, timeout=120)
    assert "Ray's raylet on this machine has died" in done.stdout, done.stderr
    assert "RESUME=1" in done.stdout
