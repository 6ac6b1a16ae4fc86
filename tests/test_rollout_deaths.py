"""A worker that dies repeats exactly what is missing, or is given up by name."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from rollout_workers import (
    CONFIG,
    IDS,
    TIMEOUT_S,
    give,
    kill_process,
    published,
    started_worker,
    tables_of,
    wait_for_restart,
)

from catalog.catalog import Catalog
from rollout.actor import StaleWeights
from rollout.restarts import WorkerLost
from rollout.streams import collect, stream_rollout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the workers take for the model: its files steer the fake engine of `blank`."""
    return tmp_path_factory.mktemp("blank")


@pytest.fixture(scope="module")
def blank(ray_session: None, small_catalog: Catalog, folder: Path) -> Iterator[ActorHandle]:
    """A worker that must be given weights first, also after each of its three restarts."""
    yield from started_worker(small_catalog, folder, rank=1, version=None, restarts=3)


@pytest.fixture
def lonely(ray_session: None, small_catalog: Catalog, folder: Path) -> Iterator[ActorHandle]:
    """A worker of a test's own, with two restarts."""
    yield from started_worker(small_catalog, folder, rank=3, version=None, restarts=2)


def test_a_worker_that_dies_in_the_middle_repeats_what_is_missing(blank: ActorHandle, folder: Path) -> None:
    weights = published(5)
    give(blank, weights)
    before = tables_of([stream_rollout(blank, 1, "train", IDS, 5, 7, CONFIG)])
    health = ray.get(blank.health.remote())
    (folder / "die_at").write_text(f"{int((folder / 'calls').read_text()) + 3}")  # the third table
    after = tables_of([stream_rollout(blank, 1, "train", IDS, 5, 7, CONFIG, weights=weights)])
    assert not (folder / "die_at").exists()
    assert ray.get(blank.health.remote())["process"] != health["process"]
    assert after == before


def test_a_worker_whose_engine_loses_a_process_is_restarted(lonely: ActorHandle, folder: Path) -> None:
    """As a rank of several under tensor parallelism that the system kills: the actor itself lives on."""
    weights = published(5)
    give(lonely, weights)
    before = tables_of([stream_rollout(lonely, 3, "train", IDS, 5, 7, CONFIG, weights=weights)])
    (folder / "lost").touch()
    assert tables_of([stream_rollout(lonely, 3, "train", IDS, 5, 7, CONFIG, weights=weights)]) == before
    (folder / "lost").touch()
    with pytest.raises(RayActorError):
        give(lonely, weights)
    assert tables_of([stream_rollout(lonely, 3, "train", IDS, 5, 7, CONFIG, weights=weights)]) == before
    assert not (folder / "lost").exists()


def test_a_worker_that_died_while_it_was_idle_is_given_its_weights_again(blank: ActorHandle) -> None:
    """As when the system runs out of memory while the learner works: Ray restarts the worker and tells nobody."""
    weights = published(6)
    give(blank, weights)
    expected = tables_of([stream_rollout(blank, 1, "train", IDS, 6, 7, CONFIG)])
    process = ray.get(blank.health.remote())["process"]
    kill_process(blank)
    wait_for_restart(blank, process)
    assert ray.get(blank.health.remote())["version"] is None
    assert tables_of([stream_rollout(blank, 1, "train", IDS, 6, 7, CONFIG, weights=weights)]) == expected
    with pytest.raises(StaleWeights, match="holds version 6, the rollout asks for version 7"):
        tables_of([stream_rollout(blank, 1, "train", IDS, 7, 7, CONFIG, weights=published(7))])


def test_a_restarted_worker_has_all_the_time_for_its_table_again(lonely: ActorHandle, folder: Path) -> None:
    stream = stream_rollout(lonely, 3, "train", IDS[:2], 5, 7, CONFIG, weights=published(5))
    stream.waited_s = TIMEOUT_S - 2  # for the worker as it was before, without weights now
    (folder / "sleep").write_text("3")
    assert len(tables_of([stream])) == 1
    (folder / "sleep").unlink()


def test_a_worker_killed_from_outside_repeats_what_is_missing_until_it_stays_dead(blank: ActorHandle) -> None:
    weights = published(6)
    give(blank, weights)
    expected = tables_of([stream_rollout(blank, 1, "train", IDS, 6, 7, CONFIG)])
    tables = collect([stream_rollout(blank, 1, "train", IDS, 6, 7, CONFIG, weights=weights)], TIMEOUT_S)
    first = ray.get(next(tables)[1])
    kill_process(blank)
    assert [first, *(ray.get(ref) for _, ref in tables)] == expected

    tables = collect([stream_rollout(blank, 1, "train", IDS, 6, 7, CONFIG, weights=weights)], TIMEOUT_S)
    next(tables)
    ray.kill(blank)
    with pytest.raises(WorkerLost, match=r"rollout worker 1 \(table \d of 4, 7 train groups at policy version 6\)"):
        list(tables)
