"""What rollout workers stream, what they refuse, and how long the driver waits."""

import operator
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.actor import ActorHandle
from rollout_workers import CONFIG, IDS, TIMEOUT_S, give, published, started_worker, tables_of

from catalog.catalog import Catalog
from rollout import streams
from rollout.actor import ChecksumMismatch, StaleWeights
from rollout.groups import GROUP_SCHEMA, Candidates, group_table, validate_groups
from rollout.metrics import group_probability, rollout_metrics
from rollout.published_weights import PublishedWeights
from rollout.restarts import RolloutTimeout
from rollout.streams import collect, stream_rollout


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
    """A worker that must be given weights first."""
    yield from started_worker(small_catalog, folder, rank=1, version=None)


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
    assert ray.get(weights.load(blank)) == weights.checksum
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


def test_streams_that_are_over_hold_no_weights(worker: ActorHandle) -> None:
    weights = published(0)
    streams = [stream_rollout(worker, 0, "train", ids, 0, 7, CONFIG, weights=weights) for ids in ([], IDS[:2])]
    assert len(list(collect(streams, 60.0))) == 1
    assert [stream.weights for stream in streams] == [None, None]


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


def test_a_table_says_how_fast_it_was_generated(blank: ActorHandle, folder: Path) -> None:
    give(blank, published(0))
    (folder / "sleep").write_text("0.2")
    tables = tables_of([stream_rollout(blank, 1, "train", IDS, 0, 7, CONFIG)])
    (folder / "sleep").unlink()
    tokens = sum(len(title) for table in tables for group in table["candidate_tokens"].to_pylist() for title in group)
    scored = [table.append_column("reward", table["score"]) for table in tables]
    metrics = rollout_metrics(scored)
    assert 0.5 * len(IDS) / 0.8 < metrics["rollout/groups_per_s"] < len(IDS) / 0.8
    np.testing.assert_allclose(metrics["rollout/tokens_per_s"] / metrics["rollout/groups_per_s"], tokens / len(IDS))
    assert rollout_metrics([]) == {}


def test_titles_count_once_in_the_probability_of_a_group() -> None:
    half, quarter, eighth = (
        np.array(logprobs, np.float32) for logprobs in ([-np.log(2)], [-np.log(2)] * 2, [-np.log(8)])
    )
    tokens = [np.ones(len(logprobs), np.int32) for logprobs in (half, quarter, quarter, eighth)]
    twice = Candidates(tokens, [half, quarter, quarter, eighth], np.array([3, 5, 5, -1], np.int32), np.zeros(4))
    alone = Candidates(tokens[3:], [eighth], np.array([5], np.int32), np.zeros(1))
    table = group_table([0, 1], 0, [[1], [1]], [3, 3], [twice, alone])
    np.testing.assert_allclose(group_probability(table), [0.75, 0.125], rtol=1e-6)
    assert rollout_metrics([table]) == {"rollout/group_probability": pytest.approx(0.4375)}


def test_time_in_which_the_driver_is_busy_is_not_held_against_a_worker(worker: ActorHandle) -> None:
    for _ in collect([stream_rollout(worker, 0, "train", IDS, 0, 0, CONFIG)], timeout_s=1.0):
        time.sleep(0.6)


def test_the_queue_is_bounded(worker: ActorHandle) -> None:
    tables = collect([stream_rollout(worker, 0, "train", IDS * 4, 0, 0, CONFIG)], TIMEOUT_S)
    next(tables)
    deadline, doing, seconds = time.monotonic() + TIMEOUT_S, "", 0.0
    while not (doing.startswith("waiting") and seconds > 0.5):  # since when it has not gone on
        assert time.monotonic() < deadline, doing
        time.sleep(0.1)
        doing, seconds = operator.itemgetter("doing", "seconds")(ray.get(worker.health.remote()))
    waiting = re.fullmatch(r"waiting for room in the queue \(train, (\d+) of 28 groups done\)", doing)
    assert waiting is not None
    assert int(waiting[1]) <= (1 + CONFIG.queue_tables + 1) * CONFIG.groups_per_table
    assert sum(1 for _ in tables) == 13


@pytest.mark.parametrize(("size", "told", "fetched"), [(10**6, 3, False), (10**6, 10**9, True), (10**3, 10**9, True)])
def test_a_result_whose_place_is_told_late_is_not_fetched(
    size: int, told: int, fetched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But one that is nowhere is, and so are small ones, as errors are, at once."""
    asked, got = [], []

    def locations(refs: list[str]) -> dict[str, dict[str, object]]:
        asked.append(refs)
        return {refs[0]: {"node_ids": ["a node"] if len(asked) > told else [], "object_size": size}}

    monkeypatch.setattr(streams, "get_local_object_locations", locations)
    monkeypatch.setattr(streams, "ray", SimpleNamespace(get=got.append))
    streams.raise_if_failed("a reference", SimpleNamespace(completed=lambda: "the end"))  # type: ignore[arg-type]
    assert bool(got) == fetched
    assert (len(asked) > 1) == (size > streams.INLINE_BYTES)
