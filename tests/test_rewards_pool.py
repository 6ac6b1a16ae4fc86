"""The pool and its actors: what comes out of them, and what happens when a reward goes wrong."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from reward_catalog import build_sample_catalog, some_groups

from catalog.catalog import Catalog
from launch.compose import compose
from launch.config import ConfigError
from launch.placement import check_devices, plan
from rewards.actor import RewardActor
from rewards.config import RewardTerm
from rewards.errors import RewardError, RewardTimeoutError
from rewards.metrics import reward_metrics
from rewards.pool import RewardPool
from rewards.ranking import ranking_rewards
from rewards.rule import rule_rewards
from rewards.terms import actor_resources
from rollout.metrics import with_seconds

FAULTY = Path(__file__).parent / "faulty_rewards.py"
StartPool = Callable[..., RewardPool]


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Catalog:
    return build_sample_catalog(tmp_path_factory.mktemp("catalogue"), tiny_tokenizer_dir)


@pytest.fixture
def start_pool(ray_session: None, catalog: Catalog) -> Iterator[StartPool]:
    """Starts pools over the sample catalogue and ends their actors."""
    pools: list[RewardPool] = []

    def start(*terms: RewardTerm) -> RewardPool:
        pools.append(RewardPool(terms, catalog.path).start())
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


def faulty(name: str, **settings: Any) -> RewardTerm:
    return RewardTerm(f"{FAULTY}:{name}", **settings)


def score(pool: RewardPool, tables: list[pa.Table]) -> list[pa.Table]:
    return ray.get(list(pool.results([pool.submit(ray.put(table), "train") for table in tables])))


def test_scored_tables_hold_every_term_and_the_weighted_sum(start_pool: StartPool) -> None:
    pool = start_pool(RewardTerm("rule"), faulty("title_length", weight=0.2), RewardTerm("ranking", weight=2.0))
    pool.ready(timeout_s=60)
    tables = [some_groups(5, seed=seed) for seed in range(3)]
    for table, scored in zip(tables, score(pool, tables), strict=True):
        assert scored.select(table.column_names).equals(table)
        assert scored.column_names[-4:] == ["reward/rule", "reward/title_length", "reward/ranking", "reward"]
        rule, length, ranking, total = (np.array(scored[name].to_pylist()) for name in scored.column_names[-4:])
        np.testing.assert_allclose(rule, rule_rewards(table).to_pylist())
        np.testing.assert_allclose(ranking, ranking_rewards(table).to_pylist())
        assert length.min() > 0.1
        np.testing.assert_allclose(total, rule + 0.2 * length + 2 * ranking, atol=1e-6)


def test_a_term_that_changes_its_groups_changes_no_other_term(catalog: Catalog) -> None:
    table = some_groups(4, seed=1)
    assert rule_rewards(table) != rule_rewards(table.take([3, 2, 1, 0]))
    terms = [faulty("Meddles"), RewardTerm("rule"), RewardTerm("ranking")]
    columns, _ = RewardActor(terms, str(catalog.path), str(Path.cwd())).score(table, "train")
    assert [columns["rule"], columns["ranking"]] == [rule_rewards(table), ranking_rewards(table)]


def test_metrics_and_what_terms_cost(start_pool: StartPool) -> None:
    pool = start_pool(RewardTerm("rule"), faulty("Constant", args={"seconds": 0.1}))
    tables = [with_seconds(some_groups(4, seed=seed), 0.5) for seed in range(3)]
    scored = list(pool.results([pool.submit(ray.put(table), "train") for table in tables]))
    metrics = pool.metrics(scored)
    assert metrics["rollout/groups_per_s"] == 4 / 0.5
    expected = reward_metrics(ray.get(scored))
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["rewards/Constant/seconds"] >= 0.3
    assert metrics["rewards/rule/seconds"] < metrics["rewards/Constant/seconds"]
    assert 2 <= metrics["rewards/Constant/queue"] <= 3
    assert "rewards/Constant/seconds" not in pool.metrics(scored)


def test_terms_run_in_parallel_and_replicas_share_tables(start_pool: StartPool, tmp_path: Path) -> None:
    """Two terms of two replicas each get two tables, and all four wait until the others have theirs."""
    args = {"folder": str(tmp_path), "count": 4}
    pool = start_pool(*(faulty("Meets", args=args, label=label, replicas=2) for label in ("a", "b")))
    assert len(score(pool, [some_groups(2)] * 2)) == 2


def test_a_raise_stops_with_the_reward_the_group_and_the_traceback(start_pool: StartPool) -> None:
    pool = start_pool(RewardTerm("rule"), faulty("raises"))
    with pytest.raises(RewardError, match=r"reward 'raises' raised on group 2:") as caught:
        score(pool, [some_groups(4)])
    assert 'raise KeyError("no price for " + group.candidate_titles[0])' in str(caught.value)
    assert "KeyError: 'no price for " in str(caught.value)
    assert "ray" not in str(caught.value)


def test_an_error_while_starting_keeps_its_traceback(start_pool: StartPool) -> None:
    pool = start_pool(faulty("CannotStart"))
    with pytest.raises(
        RewardError, match=r"(?s)reward 'CannotStart' could not be made.*FileNotFoundError: weights.bin"
    ):
        pool.ready(timeout_s=60)


def test_a_weighted_sum_that_overflows_is_an_error(start_pool: StartPool) -> None:
    pool = start_pool(RewardTerm("rule"), faulty("title_length", weight=1e39))
    with pytest.raises(RewardError, match=r"weighted sum of the rewards overflows float32.*rule"):
        score(pool, [some_groups(5, seed=0)])


def test_a_killed_actor_is_restarted_and_its_groups_are_scored_again(start_pool: StartPool, tmp_path: Path) -> None:
    pool = start_pool(RewardTerm("rule"), faulty("DiesOnce", args={"mark": str(tmp_path / "died")}))
    pool.ready(timeout_s=60)
    scored = score(pool, [some_groups(4, seed=seed) for seed in range(3)])
    assert (tmp_path / "died").exists()
    assert [table["reward/DiesOnce"].to_pylist() for table in scored] == [[[1.0] * 6] * 4] * 3


def test_a_restarted_actor_has_time_to_load_its_models_again(start_pool: StartPool, tmp_path: Path) -> None:
    slow = faulty("DiesOnce", args={"mark": str(tmp_path / "died"), "loads_s": 4.0}, timeout_s=2.0)
    pool = start_pool(RewardTerm("rule"), slow)
    pool.ready(timeout_s=60)
    assert len(score(pool, [some_groups(4, seed=seed) for seed in range(3)])) == 3
    assert (tmp_path / "died").exists()


def test_an_actor_that_cannot_load_its_models_again_ends_the_run(start_pool: StartPool, tmp_path: Path) -> None:
    pool = start_pool(
        RewardTerm("rule"), faulty("DiesLoadingAgain", args={"mark": str(tmp_path / "died")}, timeout_s=1.0)
    )
    pool.ready(timeout_s=60)
    pool._heavy[0].start_timeout_s = 1.0
    with pytest.raises(RewardError, match=r"reward 'DiesLoadingAgain'.* (within 2 s|died 3 times over)"):
        score(pool, [some_groups(4)])


def test_the_actor_that_adds_up_may_be_killed_too(start_pool: StartPool) -> None:
    pool = start_pool(RewardTerm("rule"))
    score(pool, [some_groups(1)])
    actor = pool._combining.replicas[0].actor  # type: ignore[union-attr]
    ray.kill(actor, no_restart=False)
    tables = [some_groups(4, seed=seed) for seed in range(3)]
    assert [scored["reward"].combine_chunks() for scored in score(pool, tables)] == [rule_rewards(t) for t in tables]


def test_an_actor_that_always_dies_stops_the_run(start_pool: StartPool) -> None:
    pool = start_pool(RewardTerm("rule"), faulty("DiesAlways"))
    with pytest.raises(RewardError, match=r"reward 'DiesAlways': its actor died 3 times over groups 0, 1, 2, 3"):
        score(pool, [some_groups(4)])


def test_a_hang_is_a_time_out_that_names_reward_and_groups(start_pool: StartPool) -> None:
    pool = start_pool(RewardTerm("rule"), faulty("Constant", args={"seconds": 600}, timeout_s=1.0))
    pool.ready(timeout_s=60)
    with pytest.raises(
        RewardTimeoutError, match=r"reward 'Constant' gave no answer for groups 0, 1 within 1 s; 2 tab"
    ):
        score(pool, [some_groups(2), some_groups(4)])


def test_a_long_queue_is_no_time_out(start_pool: StartPool) -> None:
    pool = start_pool(faulty("Constant", args={"seconds": 0.3}, timeout_s=2.0))
    pool.ready(timeout_s=60)
    assert len(score(pool, [some_groups(1)] * 8)) == 8


def test_terms_are_checked_before_any_actor_starts(catalog: Catalog) -> None:
    for terms, message in (
        ([RewardTerm("rul")], "did you mean 'rule'"),
        ([RewardTerm("rule"), RewardTerm("rule")], "two rewards are called 'rule'"),
        ([RewardTerm("rule", weight=float("nan"))], "weight=nan must be finite"),
        ([RewardTerm("rule", timeout_s=1e30)], "at most 1e8"),
        ([RewardTerm("rule", replicas=0)], "replicas=0 must be 1 or more"),
        ([RewardTerm("rule", num_gpus=-1)], "num_gpus=-1 must not be negative"),
        ([RewardTerm("rule", num_cpus=0.00001)], "num_cpus=1e-05 must be 0 or 0.0001 or more"),
        ([RewardTerm("rule", num_gpus=1.5)], "num_gpus=1.5 must be a whole number where it is above 1"),
        ([RewardTerm("rule", num_cpus=math.nan)], "num_cpus=nan must be finite"),
        ([RewardTerm("rule", timeout_s=math.inf)], "timeout_s=inf must be finite"),
    ):
        with pytest.raises(RewardError, match=message):
            RewardPool(terms, catalog.path)


def test_light_terms_share_actors_and_the_plan_counts_what_those_reserve() -> None:
    terms = [RewardTerm("rule", num_cpus=1), RewardTerm("popularity", num_cpus=1, replicas=4)]
    assert actor_resources(terms) == [{"CPU": 2, "GPU": 0}] * 4
    heavy = [faulty("Constant", num_cpus=3, replicas=2), RewardTerm("ranking", num_gpus=0.5)]
    assert actor_resources([*heavy, *terms]) == [
        *[{"CPU": 3, "GPU": 0}] * 2,
        {"CPU": 0, "GPU": 0.5},
        *[{"CPU": 2, "GPU": 0}] * 4,
    ]
    assert actor_resources(heavy)[-1] == {"CPU": 0, "GPU": 0}  # adds up
    assert len(actor_resources([RewardTerm(name) for name in ("rule", "ranking", "popularity", "diversity")])) == 1

    config = compose(overrides=["rewards=[{name: rule,num_cpus: 1},{name: popularity,num_cpus: 1,replicas: 4}]"])
    placement = plan(config)
    assert placement.total("CPU") == 8
    with pytest.raises(ConfigError, match=r"needs 8 CPU \(found 5\)"):
        check_devices(config, placement, {"CPU": 5.0})


def test_actors_reserve_what_is_said(start_pool: StartPool) -> None:
    terms = [RewardTerm("rule", num_cpus=0.25), RewardTerm("popularity", num_cpus=0.25, replicas=2)]
    (stage,) = start_pool(*terms)._stages

    def of_this_actor(_: object) -> float:
        return ray.get_runtime_context().get_assigned_resources()["CPU"]

    reserved = [ray.get(replica.actor.__ray_call__.remote(of_this_actor)) for replica in stage.replicas]
    assert reserved == [resources["CPU"] for resources in actor_resources(terms)] == [0.5, 0.5]


def test_a_pool_that_was_not_started_says_so(catalog: Catalog) -> None:
    with pytest.raises(RewardError, match=r"call RewardPool.start\(\) first"):
        RewardPool([RewardTerm("rule")], catalog.path).submit(None, "train")
