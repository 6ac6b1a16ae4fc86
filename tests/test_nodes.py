"""A cluster of several nodes: where actors land, and what every node must have."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.actors import ClusterUnreachable, RayNotStarted, connect
from launch.compose import compose
from launch.config import ConfigError
from launch.nodes import inherited_environment
from rollout.actor import worker_environment
from rollout.config import RolloutConfig

TWO_NODES = """
import sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from launch.actors import connect
from launch.compose import compose
from launch.config import ConfigError
from launch.nodes import check_nodes
from launch.placement import actor_options, alive_nodes, plan
from launch.waiting import fetch
from rollout.restarts import DataLost

cluster = Cluster(True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8})
other = cluster.add_node(num_cpus=1, object_store_memory=10**8, resources={"other": 1})
config = compose(overrides=[f"cluster.address={cluster.address}", "rollout.workers=6"])
connect(config)
check_nodes([Path(sys.argv[1])], 60.0)  # from then on the head, too, knows of both

@ray.remote
class Actor:
    def where(self):
        import os
        return ray.get_runtime_context().get_node_id(), os.environ["DS_ACCELERATOR"]

placement = plan(config)
actors = [Actor.options(**actor_options(placement, None, i, alive_nodes())).remote() for i in range(6)]
nodes, inherited = zip(*ray.get([actor.where.remote() for actor in actors]))
assert list(nodes) == 3 * alive_nodes(), "the actors are not dealt to the nodes in turn"
assert set(inherited) == {"here"}
for actor in actors:
    ray.kill(actor)
try:
    check_nodes([Path(sys.argv[1]), Path(sys.argv[1]) / "elsewhere"], 60.0)
except ConfigError as error:
    print(error)

@ray.remote(num_cpus=0, max_retries=0)
def large():
    return bytes(10**6)

table = large.options(resources={"other": 1}).remote()
ray.wait([table], fetch_local=False)
cluster.remove_node(other)
try:
    fetch(table, 60.0, "a table")
except DataLost as error:
    print(error)
ray.shutdown()
cluster.shutdown()
"""


def test_two_nodes_share_the_actors_must_share_files_and_take_their_objects_along(tmp_path: Path) -> None:
    environment = os.environ | {"DS_ACCELERATOR": "here", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_NODES, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"has no {tmp_path}/elsewhere; all nodes of a cluster need" in done.stdout
    assert "data were lost with the node that held them" in done.stdout


def test_actors_elsewhere_have_the_drivers_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("SECRET", "of the driver's machine")
    assert inherited_environment()["VLLM_LOGGING_LEVEL"] == "ERROR"
    assert "SECRET" not in inherited_environment()


def test_workers_share_the_cores_of_their_own_node() -> None:
    cores = len(os.sched_getaffinity(0))
    config = RolloutConfig(workers=2 * cores)
    assert worker_environment(config, on_gpu=False)["OMP_NUM_THREADS"] == "1"
    assert worker_environment(config, on_gpu=False, nodes=2 * cores)["OMP_NUM_THREADS"] == str(cores)


def test_a_run_with_a_ray_of_its_own_joins_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an address, Ray joins what RAY_ADDRESS or another program on the machine names."""
    given: dict[str, object] = {}

    def init(**settings: object) -> SimpleNamespace:
        given.update(settings)
        return SimpleNamespace(address_info={"session_dir": str(tmp_path)})

    monkeypatch.setattr("ray.init", init)
    assert connect(compose()) == tmp_path / "logs"
    assert given["address"] == "local"


def test_a_ray_that_cannot_keep_its_files_says_where_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: object) -> None:
        raise OSError("AF_UNIX path length cannot exceed 107 bytes: /scratch/ray/session/sockets/plasma_store")

    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(ConfigError, match=r"Ray cannot start here: AF_UNIX path length .* set RAY_TMPDIR"):
        connect(compose())


def test_a_cluster_that_wants_another_authentication_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import AuthenticationError

    def refuse(**settings: object) -> None:
        raise AuthenticationError("no token")

    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(ClusterUnreachable, match=r"cluster\.address=auto: .* RAY_AUTH_MODE"):
        connect(compose(overrides=["cluster.address=auto"]))


def test_a_ray_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**settings: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("ray.init", late)
    with pytest.raises(RayNotStarted, match=r"within the time .* too busy"):
        connect(compose())


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere.invalid:6379"])
def test_an_address_where_nobody_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("ray.init", lambda **settings: pytest.fail("Ray would wait for it for minutes"))
    with pytest.raises(
        ClusterUnreachable, match=rf"cluster\.address={address}: no Ray cluster answers \(.*; start one"
    ):
        connect(compose(overrides=[f"cluster.address={address}"]))
