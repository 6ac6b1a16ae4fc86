"""Rollout workers: what they stream, what they refuse, and what happens when they die."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import rollout_fakes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from catalog.build import build_catalog
from catalog.catalog import Catalog
from catalog.config import DataConfig, GeneratedConfig
from launch.rollout_fleet import Flight, RolloutFleet
from rollout.actor import ChecksumMismatch, RolloutWorker, StaleWeights, group_seed
from rollout.assign import assign
from rollout.config import RolloutConfig
from rollout.groups import GROUP_SCHEMA, validate_groups
from rollout.streams import PublishedWeights, RolloutTimeout, WorkerLost, collect, stream_rollout
from rollout.weights import WeightBucket, checksum

CONFIG = RolloutConfig(group_size=4, groups_per_table=2, queue_tables=2)
IDS = [5, 0, 3, 9, 1, 7, 2]
TIMEOUT_S = 60.0


cloudpickle.register_pickle_by_value(rollout_fakes)  # Ray's workers do not have the tests on their path


@pytest.fixture(scope="module")
def small_catalog(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    data = DataConfig(cache=str(tmp_path_factory.mktemp("catalog")), generated=GeneratedConfig(items=200, users=120))
    return build_catalog(data, str(tiny_tokenizer_dir))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the workers take for the model: its files steer the fake engine of `blank`."""
    return tmp_path_factory.mktemp("blank")


@pytest.fixture(scope="module")
def worker(
    ray_session: None, small_catalog: Catalog, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ActorHandle]:
    """A worker whose weights are version 0."""
    yield from started_worker(small_catalog, tmp_path_factory.mktemp("worker"), rank=0, version=0)


@pytest.fixture(scope="module")
def blank(ray_session: None, small_catalog: Catalog, folder: Path) -> Iterator[ActorHandle]:
    """A worker that must be given weights first, also after each of its two restarts."""
    yield from started_worker(small_catalog, folder, rank=1, version=None)


def started_worker(catalog: Catalog, folder: Path, rank: int, version: int | None) -> Iterator[ActorHandle]:
    options = RolloutWorker.options(num_cpus=0, max_restarts=2)
    handle = options.remote(rank, str(folder), str(catalog.path), CONFIG, version, rollout_fakes.FakeEngine)
    ray.get(handle.ready.remote(), timeout=TIMEOUT_S)
    yield handle
    ray.kill(handle)


def give(worker: ActorHandle, weights: PublishedWeights) -> None:
    ray.get(weights.load(worker), timeout=TIMEOUT_S)


def tables_of(streams: list, timeout_s: float = TIMEOUT_S) -> list[pa.Table]:
    return [ray.get(ref) for _, ref in collect(streams, timeout_s)]


def published(version: int, value: float = 1.0) -> PublishedWeights:
    tensors = [("a", torch.full((3, 2), value)), ("b", torch.arange(4.0))]
    refs = [ray.put(WeightBucket.pack([tensor])) for tensor in tensors]
    return PublishedWeights(version, refs, checksum(tensors))


@pytest.fixture
def fleet(ray_session: None, small_catalog: Catalog, folder: Path) -> Iterator[RolloutFleet]:
    """One worker, its engine up."""
    config = replace(CONFIG, sleep=True, timeout_s=20.0)
    fleet = RolloutFleet(config, small_catalog, folder, [{"num_cpus": 0}], rollout_fakes.FakeEngine)
    fleet.ready(TIMEOUT_S)
    yield fleet
    for worker in fleet.workers:
        ray.kill(worker)


def kill_process(worker: ActorHandle) -> None:
    os.kill(ray.get(worker.health.remote())["process"], signal.SIGKILL)


def landed(fleet: RolloutFleet, flight: Flight) -> list[pa.Table]:
    return [ray.get(ref) for ref in fleet.land(flight)]


def test_a_fleet_sleeps_though_a_worker_has_died_and_wakes_with_the_next_weights(fleet: RolloutFleet) -> None:
    kill_process(fleet.workers[0])
    fleet.sleep()
    fleet.publish(lambda version: published(version), version=1)
    fleet.loaded()
    tables = landed(fleet, fleet.launch("train", np.asarray(IDS), seed=0))
    assert sum(map(len, tables)) == len(IDS)


def test_a_worker_that_dies_with_flights_queued_restarts_each_once(fleet: RolloutFleet, folder: Path) -> None:
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


def test_a_stream_is_the_groups_of_the_examples_in_order(worker: ActorHandle, small_catalog: Catalog) -> None:
    tables = tables_of([stream_rollout(worker, 0, "train", IDS, 0, seed=7, config=CONFIG)])
    assert [len(table) for table in tables] == [2, 2, 2, 1]
    for table in tables:
        assert table.schema == GROUP_SCHEMA
        validate_groups(table)
    whole = pa.concat_tables(tables)
    examples = small_catalog.examples("train")
    assert whole["example_id"].to_pylist() == IDS
    assert whole["target_class"].to_pylist() == [examples.target_class[i] for i in IDS]
    assert whole["prompt_tokens"].to_pylist() == [examples.prompt_tokens(i).tolist() for i in IDS]
    assert all(len(group) == 4 for group in whole["candidate_class"].to_pylist())


def test_a_group_does_not_depend_on_its_neighbours(worker: ActorHandle) -> None:
    def by_example(ids: list[int], seed: int) -> dict[int, list[int]]:
        table = pa.concat_tables(tables_of([stream_rollout(worker, 0, "train", ids, 0, seed, CONFIG)]))
        return dict(zip(table["example_id"].to_pylist(), table["candidate_class"].to_pylist(), strict=True))

    forwards = by_example(IDS, 7)
    assert by_example(IDS[::-1], 7) == forwards
    assert by_example(IDS[:3], 7) == {i: forwards[i] for i in IDS[:3]}
    assert by_example(IDS, 8) != forwards


def test_the_group_size_of_an_evaluation(worker: ActorHandle) -> None:
    stream = stream_rollout(worker, 0, "test", [0, 1], 0, 0, CONFIG, group_size=9, strategy="beam")
    assert [len(group) for group in tables_of([stream])[0]["candidate_class"].to_pylist()] == [9, 9]


def test_another_policy_version_is_refused(worker: ActorHandle) -> None:
    with pytest.raises(StaleWeights, match=r"worker 0 holds version 0, the rollout asks for version 3"):
        tables_of([stream_rollout(worker, 0, "train", IDS, 3, 0, CONFIG)])


def test_nothing_is_rolled_out_before_weights_are_known(blank: ActorHandle) -> None:
    with pytest.raises(StaleWeights, match="worker 1 holds no version,"):
        tables_of([stream_rollout(blank, 1, "train", IDS, 0, 0, CONFIG)])
    weights = published(0)
    assert ray.get(weights.load(blank))["checksum"] == weights.checksum
    assert len(tables_of([stream_rollout(blank, 1, "train", IDS, 0, 0, CONFIG)])) == 4
    ray.get(blank.sleep.remote(), timeout=TIMEOUT_S)
    with pytest.raises(StaleWeights, match="worker 1 holds no version,"):
        tables_of([stream_rollout(blank, 1, "train", IDS, 0, 0, CONFIG)])
    give(blank, weights)
    assert len(tables_of([stream_rollout(blank, 1, "train", IDS, 0, 0, CONFIG)])) == 4


def test_weights_that_arrive_changed_stop_the_worker(blank: ActorHandle) -> None:
    sent, other = published(1), published(1, value=2.0)
    wrong = PublishedWeights(1, other.bucket_refs, sent.checksum)
    with pytest.raises(ChecksumMismatch) as error:
        give(blank, wrong)
    assert f"{sent.checksum:#018x}" in str(error.value)
    assert f"{other.checksum:#018x}" in str(error.value)
    with pytest.raises(StaleWeights):
        tables_of([stream_rollout(blank, 1, "train", IDS, 1, 0, CONFIG)])


def test_tables_of_several_workers_interleave(worker: ActorHandle, blank: ActorHandle) -> None:
    give(blank, published(0))
    streams = [stream_rollout(handle, rank, "train", IDS, 0, 0, CONFIG) for rank, handle in enumerate((worker, blank))]
    tables: list[list[pa.Table]] = [[], []]
    for rank, ref in collect(streams, TIMEOUT_S):
        tables[rank].append(ray.get(ref))
    assert len(tables[0]) == 4
    assert tables[0] == tables[1]  # whichever worker generates a group, it is the same


def test_a_slow_worker_is_named_with_what_it_does(blank: ActorHandle, folder: Path) -> None:
    give(blank, published(0))
    (folder / "sleep").write_text("3")
    started = time.monotonic()
    with pytest.raises(RolloutTimeout) as error:
        tables_of([stream_rollout(blank, 1, "valid", IDS[:3], 0, 0, CONFIG)], timeout_s=0.5)
    assert time.monotonic() - started < 3
    (folder / "sleep").unlink()
    message = str(error.value)
    assert "rollout worker 1 (table 1 of 2, 3 valid groups at policy version 0)" in message
    assert "generating groups 0 to 1 of 3 (valid)" in message


def test_a_worker_that_dies_in_the_middle_repeats_what_is_missing(blank: ActorHandle, folder: Path) -> None:
    weights = published(5)
    give(blank, weights)
    before = tables_of([stream_rollout(blank, 1, "train", IDS, 5, 7, CONFIG)])
    health = ray.get(blank.health.remote())
    (folder / "die_at").write_text(f"{ray.get(blank.timings.remote())['calls'] + 3:.0f}")  # the third table
    after = tables_of([stream_rollout(blank, 1, "train", IDS, 5, 7, CONFIG, weights=weights)])
    assert not (folder / "die_at").exists()
    assert ray.get(blank.health.remote())["process"] != health["process"]
    assert after == before


def test_a_worker_that_died_while_it_was_idle_is_given_its_weights_again(
    small_catalog: Catalog, folder: Path, ray_session: None
) -> None:
    """As when the system runs out of memory while the learner works: Ray restarts the worker and tells nobody."""
    for worker in started_worker(small_catalog, folder, rank=2, version=None):
        weights = published(6)
        give(worker, weights)
        expected = tables_of([stream_rollout(worker, 2, "train", IDS, 6, 7, CONFIG)])
        process = ray.get(worker.health.remote())["process"]
        os.kill(process, signal.SIGKILL)
        wait_for_restart(worker, process)
        assert ray.get(worker.health.remote())["version"] is None
        assert tables_of([stream_rollout(worker, 2, "train", IDS, 6, 7, CONFIG, weights=weights)]) == expected
        with pytest.raises(StaleWeights, match="holds version 6, the rollout asks for version 7"):
            tables_of([stream_rollout(worker, 2, "train", IDS, 7, 7, CONFIG, weights=published(7))])


def wait_for_restart(worker: ActorHandle, process: int) -> None:
    """Until another process answers for the worker."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(RayActorError):
            if ray.get(worker.health.remote(), timeout=TIMEOUT_S)["process"] != process:
                return
        time.sleep(0.1)
    raise TimeoutError("the worker was not restarted")


def test_a_worker_killed_from_outside_repeats_what_is_missing_until_it_stays_dead(blank: ActorHandle) -> None:
    weights = published(6)
    give(blank, weights)
    expected = tables_of([stream_rollout(blank, 1, "train", IDS, 6, 7, CONFIG)])
    tables = collect([stream_rollout(blank, 1, "train", IDS, 6, 7, CONFIG, weights=weights)], TIMEOUT_S)
    first = ray.get(next(tables)[1])
    os.kill(ray.get(blank.health.remote())["process"], signal.SIGKILL)
    assert [first, *(ray.get(ref) for _, ref in tables)] == expected

    tables = collect([stream_rollout(blank, 1, "train", IDS, 6, 7, CONFIG, weights=weights)], TIMEOUT_S)
    next(tables)
    ray.kill(blank)
    with pytest.raises(WorkerLost, match=r"rollout worker 1 \(table \d of 4, 7 train groups at policy version 6\)"):
        list(tables)


def test_time_in_which_the_driver_is_busy_is_not_held_against_a_worker(worker: ActorHandle) -> None:
    for _ in collect([stream_rollout(worker, 0, "train", IDS, 0, 0, CONFIG)], timeout_s=1.0):
        time.sleep(0.6)


def test_the_queue_is_bounded(worker: ActorHandle) -> None:
    before = ray.get(worker.timings.remote())["groups"]
    tables = collect([stream_rollout(worker, 0, "train", IDS * 4, 0, 0, CONFIG)], TIMEOUT_S)
    next(tables)
    time.sleep(0.5)
    groups = ray.get(worker.timings.remote())["groups"] - before
    assert groups <= (1 + CONFIG.queue_tables + 1) * CONFIG.groups_per_table
    health = ray.get(worker.health.remote())
    assert "waiting for room in the queue" in health["doing"]
    assert sum(1 for _ in tables) == 13


@given(
    lengths=st.lists(st.integers(1, 600), max_size=80),
    workers=st.integers(1, 7),
    groups_per_table=st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_every_group_goes_to_one_worker_and_the_load_is_even(
    lengths: list[int], workers: int, groups_per_table: int
) -> None:
    plan = assign(lengths, workers, groups_per_table)
    assert plan == assign(lengths, workers, groups_per_table)
    assert sorted(index for share in plan for index in share) == list(range(len(lengths)))
    counts = [len(share) for share in plan]
    assert max(counts) - min(counts) <= 1
    loads = [sum(lengths[i] for i in share) for share in plan]
    assert max(loads) - min(loads) <= max(lengths, default=0) * (1 + (max(counts) > min(counts)))


def test_the_longest_prompts_are_spread_over_workers_and_tables() -> None:
    lengths = [600, 600, 600, 600] + [50] * 28
    plan = assign(lengths, 2, 8)
    tables = [share[i : i + 8] for share in plan for i in range(0, 16, 8)]
    assert [sum(lengths[i] == 600 for i in table) for table in tables] == [1, 1, 1, 1]


def test_group_seeds_differ_and_are_stable() -> None:
    seeds = {group_seed(seed, version, example) for seed in range(8) for version in range(8) for example in range(64)}
    assert len(seeds) == 8 * 8 * 64
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert group_seed(1, 2, 3) == group_seed(1, 2, np.int64(3))
