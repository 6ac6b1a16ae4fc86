"""A fleet of rollout workers goes on whatever dies, with the weights of each flight."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import rollout_fakes
from rollout_workers import CONFIG, IDS, TIMEOUT_S, kill_process, published, wait_for_restart

from catalog.catalog import Catalog
from launch.rollout_fleet import Flight, RolloutFleet
from rollout.actor import ChecksumMismatch
from rollout.restarts import RolloutTimeout, WorkerLost


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the worker takes for the model."""
    return tmp_path_factory.mktemp("blank")


@pytest.fixture
def fleet(ray_session: None, small_catalog: Catalog, folder: Path) -> Iterator[RolloutFleet]:
    """One worker, its engine up."""
    config = replace(CONFIG, sleep=True, timeout_s=60.0)
    fleet = RolloutFleet(config, small_catalog, folder, [{"num_cpus": 0}], rollout_fakes.FakeEngine)
    fleet.ready(TIMEOUT_S)
    yield fleet
    for worker in fleet.workers:
        ray.kill(worker)


def landed(fleet: RolloutFleet, flight: Flight) -> list[pa.Table]:
    return [ray.get(ref) for _, ref in fleet.land(flight)]


def test_a_fleet_sleeps_though_a_worker_has_died_and_wakes_with_the_next_weights(fleet: RolloutFleet) -> None:
    kill_process(fleet.workers[0])
    fleet.sleep()
    fleet.publish(lambda version: published(version), version=1)
    fleet.loaded()
    tables = landed(fleet, fleet.launch("train", np.asarray(IDS), seed=0))
    assert sum(map(len, tables)) == len(IDS)


def test_a_worker_that_dies_with_nothing_to_do_is_told_of_once(
    fleet: RolloutFleet, caplog: pytest.LogCaptureFixture
) -> None:
    process = ray.get(fleet.workers[0].health.remote())["process"]
    kill_process(fleet.workers[0])
    wait_for_restart(fleet.workers[0], process)
    for version in (1, 2):
        fleet.publish(lambda version: published(version), version)
        fleet.loaded()
    assert caplog.text.count("rollout worker 0: its process has ended; a new one is in its place") == 1


def test_an_example_of_two_passes_is_sampled_twice_also_by_a_worker_that_was_restarted(
    fleet: RolloutFleet, folder: Path
) -> None:
    ids, passes = np.array([5, 0, 3, 5, 1, 0]), np.array([0, 0, 0, 1, 1, 1])

    def groups(of: np.ndarray, chosen: slice = slice(None)) -> list[tuple[int, list[int]]]:
        flight = fleet.launch("train", ids[chosen], seed=7, passes=of[chosen])
        whole = pa.concat_tables(landed(fleet, flight))
        return sorted(zip(whole["example_id"].to_pylist(), whole["candidate_class"].to_pylist(), strict=True))

    fleet.publish(lambda version: published(version), version=3)
    found = groups(passes)
    assert len({(example, tuple(group)) for example, group in found}) == len(ids)
    assert found == sorted(groups(passes, slice(3)) + groups(passes, slice(3, 6)))
    flight = fleet.launch("train", ids, seed=7, passes=passes)
    kill_process(fleet.workers[0])
    again = pa.concat_tables(landed(fleet, flight))
    assert sorted(zip(again["example_id"].to_pylist(), again["candidate_class"].to_pylist(), strict=True)) == found


def test_weights_that_no_rollout_needed_are_confirmed_with_the_next(fleet: RolloutFleet) -> None:
    for version in (1, 2, 3):
        fleet.publish(published, version)
    landed(fleet, fleet.launch("train", np.asarray(IDS), seed=0))
    assert fleet.confirmed_loads == 3
    fleet.publish(lambda version: replace(published(version), checksum=1), version=4)
    fleet.publish(published, version=5)
    with pytest.raises(ChecksumMismatch, match=r"rollout worker 0, version 4"):
        fleet.loaded()


def test_a_worker_that_stays_dead_is_named(fleet: RolloutFleet) -> None:
    fleet.publish(lambda version: published(version), version=1)
    flight = fleet.launch("train", np.asarray(IDS), seed=0)
    ray.kill(fleet.workers[0])
    with pytest.raises(WorkerLost, match=r"rollout worker 0 .* died and was not restarted"):
        landed(fleet, flight)
    fleet.publish(lambda version: published(version), version=2)
    with pytest.raises(WorkerLost, match="rollout worker 0: died and was not restarted"):
        fleet.loaded()


def test_a_worker_that_dies_with_flights_queued_restarts_each_once(
    fleet: RolloutFleet, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The flight behind is running again when it is landed, and waits for room in its queue."""
    ids = np.arange(14)
    fleet.publish(lambda version: published(version), version=0)
    expected = landed(fleet, fleet.launch("train", ids, seed=1))
    fleet.publish(lambda version: published(version), version=1)
    flights = [fleet.launch("train", ids, seed=0)]
    fleet.publish(lambda version: published(version), version=2)
    flights.append(fleet.launch("train", ids, seed=1))
    kill_process(fleet.workers[0])
    assert sum(map(len, landed(fleet, flights[0]))) == len(ids)
    process = ray.get(fleet.workers[0].health.remote())["process"]
    versions = {2: landed(fleet, flights[1])}
    assert len(versions[2]) == len(expected)
    assert set(pa.concat_tables(versions[2])["policy_version"].to_pylist()) == {2}
    assert ray.get(fleet.workers[0].health.remote())["process"] == process  # nobody had to start it again
    fleet.publish(lambda version: published(version), version=3)
    fleet.loaded()
    assert caplog.text.count("its process has ended") == 1


@pytest.mark.parametrize("groups", [2, 14])
def test_flights_behind_one_whose_worker_died_are_rolled_out_with_their_own_weights(
    fleet: RolloutFleet, folder: Path, groups: int
) -> None:
    """With stale weights several flights wait at a worker, and each may fill its queue."""
    ids = np.arange(groups)
    fleet.publish(lambda version: published(version), version=0)
    expected = [landed(fleet, fleet.launch("train", ids, seed=seed)) for seed in range(2)]
    flights = [fleet.launch("train", ids, seed=seed) for seed in range(2)]
    assert landed(fleet, flights[0]) == expected[0]
    process = ray.get(fleet.workers[0].health.remote())["process"]
    kill_process(fleet.workers[0])
    wait_for_restart(fleet.workers[0], process)
    fleet.publish(lambda version: published(version, value=2.0), version=1)
    flights += [fleet.launch("train", ids, seed=seed) for seed in (2, 3)]
    assert landed(fleet, flights[1]) == expected[1]
    versions = [set(pa.concat_tables(landed(fleet, flight))["policy_version"].to_pylist()) for flight in flights[2:]]
    assert versions == [{1}, {1}]


def test_a_worker_that_dies_while_its_engine_starts_is_started_again(
    ray_session: None, small_catalog: Catalog, tmp_path: Path
) -> None:
    (tmp_path / "die_at").write_text("0")
    fleet = RolloutFleet(CONFIG, small_catalog, tmp_path, [{"num_cpus": 0}], rollout_fakes.FakeEngine)
    fleet.ready(TIMEOUT_S)
    assert not (tmp_path / "die_at").exists()
    ray.kill(fleet.workers[0])


def test_a_worker_whose_engine_never_comes_up_is_named(
    ray_session: None, small_catalog: Catalog, tmp_path: Path
) -> None:
    (tmp_path / "die_at").write_text("always")
    fleet = RolloutFleet(CONFIG, small_catalog, tmp_path, [{"num_cpus": 0}], rollout_fakes.FakeEngine)
    with pytest.raises(WorkerLost, match="rollout worker 0 died 3 times while its engine started"):
        fleet.ready(TIMEOUT_S)
    ray.kill(fleet.workers[0])


@pytest.fixture
def brief(ray_session: None, small_catalog: Catalog, tmp_path: Path) -> Iterator[RolloutFleet]:
    """One worker that may take three seconds for a call, steered by files of `tmp_path`."""
    config = replace(CONFIG, timeout_s=3.0)
    fleet = RolloutFleet(config, small_catalog, tmp_path, [{"num_cpus": 0}], rollout_fakes.FakeEngine)
    fleet.ready(TIMEOUT_S)
    yield fleet
    for worker in fleet.workers:
        ray.kill(worker)


@pytest.mark.parametrize("noticed", ["at once", "when it is up again"])
def test_a_restarted_worker_has_the_time_of_a_first_start(brief: RolloutFleet, tmp_path: Path, noticed: str) -> None:
    """Also where it is asked to load weights before its new process has an engine."""
    (tmp_path / "start").write_text("4")
    process = ray.get(brief.workers[0].health.remote())["process"]
    kill_process(brief.workers[0])
    if noticed == "when it is up again":
        wait_for_restart(brief.workers[0], process)
    brief.publish(published, version=1)
    brief.loaded()
    assert ray.get(brief.workers[0].health.remote())["version"] == 1


def test_a_restart_that_takes_too_long_names_its_limits(brief: RolloutFleet, tmp_path: Path) -> None:
    brief.ready(0.5)  # as a limit of later starts: it is up
    (tmp_path / "start").write_text("60")
    kill_process(brief.workers[0])
    brief.publish(published, version=1)
    limit = r"after 3\.5 s; raise cluster\.start_timeout_s or rollout\.timeout_s, whose sum that is"
    with pytest.raises(RolloutTimeout, match=f"rollout worker 0: restart is not done {limit}"):
        brief.loaded()


def test_a_load_that_takes_too_long_names_its_limit(brief: RolloutFleet, tmp_path: Path) -> None:
    brief.publish(published, version=1)
    (tmp_path / "sleep").write_text("60")
    brief.launch("train", np.asarray(IDS), seed=0)
    brief.publish(published, version=2)
    with pytest.raises(RolloutTimeout, match=r"0 has not loaded version 2 after 3 s; raise rollout\.timeout_s if"):
        brief.loaded()


def test_a_worker_that_dies_whenever_it_is_started_again_is_named(brief: RolloutFleet, tmp_path: Path) -> None:
    brief.ready(TIMEOUT_S)
    brief.publish(published, version=1)
    brief.loaded()
    (tmp_path / "die_at").write_text("always")
    flight = brief.launch("train", np.asarray(IDS), seed=0)
    with pytest.raises(WorkerLost, match=r"rollout worker 0 \(table 1 .* died 3 times while it was started again \("):
        landed(brief, flight)


def test_engines_of_several_processes_end_before_their_workers_are_killed(
    ray_session: None, small_catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, tensor_parallel=2)
    fleet = RolloutFleet(config, small_catalog, tmp_path, [{"num_cpus": 0}] * 2, rollout_fakes.FakeEngine)
    fleet.ready(TIMEOUT_S)
    kill_process(fleet.workers[1])
    fleet.close()
    assert (tmp_path / "ended").exists()
    (tmp_path / "ended").unlink()
    fleet.publish(published, 1)
    (tmp_path / "sleep").write_text("60")
    fleet.launch("train", np.asarray(IDS), seed=0)
    monkeypatch.setattr("launch.rollout_fleet.CLOSE_S", 0.1)
    fleet.close()  # in the middle of a rollout it does not wait for the end of that
    assert not (tmp_path / "ended").exists()
    for worker in fleet.workers:
        ray.kill(worker)
