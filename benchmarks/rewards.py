"""Rewards: rule + ranking in one actor, against loops over candidates as in the published code, and what a step pays.

make bench-rewards
"""

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import ray

from benchmarks.harness import Row, compare, timed, write_rows
from catalog.build import build_catalog
from catalog.catalog import Catalog
from launch.compose import compose
from launch.model import prepare_model
from rewards.config import RewardTerm
from rewards.pool import RewardPool
from rewards.ranking import ranking_rewards
from rewards.rule import rule_rewards
from rollout.groups import GROUP_SCHEMA

GROUPS = 10_000
GROUP_SIZE = 16
TOKENS = 12
"""Tokens of a candidate; only their transport depends on it."""
STEP_GROUPS = 32
TABLE_GROUPS = 8
LIMIT_S = 0.5
TERMS = (RewardTerm("rule"), RewardTerm("ranking"))


def random_groups(groups: int, classes: int, seed: int = 0) -> pa.Table:
    """Groups of GROUP_SIZE random candidates, the target at a random rank of every second one; examples 0 .. 99."""
    draw = np.random.default_rng(seed)
    target = draw.integers(0, classes, groups).astype(np.int32)
    candidates = draw.integers(0, classes, (groups, GROUP_SIZE)).astype(np.int32)
    candidates[np.arange(0, groups, 2), draw.integers(0, GROUP_SIZE, (groups + 1) // 2)] = target[::2]
    by_group = np.arange(groups + 1, dtype=np.int32) * GROUP_SIZE
    by_candidate = np.arange(groups * GROUP_SIZE + 1, dtype=np.int32) * TOKENS

    def per_token(values: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(by_group, pa.ListArray.from_arrays(by_candidate, pa.array(values)))

    tokens = draw.integers(0, 1000, groups * GROUP_SIZE * TOKENS).astype(np.int32)
    columns = {
        "example_id": np.arange(groups) % 100,
        "policy_version": np.zeros(groups, np.int64),
        "prompt_tokens": pa.ListArray.from_arrays(by_group, pa.array(np.zeros(groups * GROUP_SIZE, np.int32))),
        "target_class": target,
        "candidate_class": pa.ListArray.from_arrays(by_group, pa.array(candidates.ravel())),
        "candidate_tokens": per_token(tokens),
        "candidate_logprobs": per_token(-np.ones(len(tokens), np.float32)),
        "score": pa.ListArray.from_arrays(by_group, pa.array(-np.ones(groups * GROUP_SIZE, np.float32))),
    }
    return pa.table(columns).cast(GROUP_SCHEMA)


def published_rewards(candidates: list[list[str]], targets: list[str]) -> list[list[float]]:
    """rule + ranking as the published code computes them: text against text, one candidate after another."""
    weight = [-1 / np.log2(rank + 2) for rank in range(GROUP_SIZE)]
    penalty = [-value / sum(weight) for value in weight]
    rewards = []
    for texts, target in zip(candidates, targets, strict=True):
        rule, ranking, found = [], [], False
        for rank, text in enumerate(texts):
            hit = text.strip('\n"') == target.strip('\n"')
            found = found or hit
            rule.append(1.0 if hit else 0.0)
            ranking.append(0.0 if hit else penalty[rank])
        rewards.append([a + (b if found else 0.0) for a, b in zip(rule, ranking, strict=True)])
    return rewards


def against_loops(catalog: Catalog, table: pa.Table) -> Row:
    """The formulas alone, in one process. Asserts that both sides agree."""
    texts = [[catalog.title(c) for c in row] for row in table["candidate_class"].to_pylist()]
    targets = [catalog.title(c) for c in table["target_class"].to_pylist()]

    def ours() -> np.ndarray:
        return rule_rewards(table).values.to_numpy() + ranking_rewards(table).values.to_numpy()

    np.testing.assert_allclose(ours(), np.ravel(published_rewards(texts, targets)), atol=1e-6)
    return compare(
        "rule + ranking",
        f"{GROUPS:,} x {GROUP_SIZE}",
        ours,
        lambda: published_rewards(texts, targets),
        repeats=9,
        note="one candidate after another, as published",
    )


def one_actor(catalog: Catalog, table: pa.Table, repeats: int = 9) -> dict[str, float]:
    """10,000 groups in one table: seconds inside the actor, and with transport, checks and the sum."""
    pool, inside, outside = RewardPool(TERMS, catalog.path).start(), [], []
    pool.ready(timeout_s=120)
    ref = ray.put(table)
    for _ in range(repeats):
        started = time.perf_counter()
        scored = pool.result(pool.submit(ref, "train"))
        outside.append(time.perf_counter() - started)
        metrics = pool.metrics([scored])
        inside.append(sum(metrics[f"rewards/{term.key}/seconds"] for term in TERMS))
    pool.close()
    return {"inside_the_actor_s": median(inside), "there_and_back_s": median(outside)}


def one_step(catalog: Catalog, repeats: int = 50) -> dict[str, float]:
    """What the loop waits for the rewards of one step when the last table of its groups arrives."""
    pool = RewardPool(TERMS, catalog.path).start()
    pool.ready(timeout_s=120)
    tables = [
        ray.put(random_groups(TABLE_GROUPS, catalog.num_classes, seed)) for seed in range(STEP_GROUPS // TABLE_GROUPS)
    ]

    def step() -> None:
        handles = [pool.submit(table, "train") for table in tables]
        list(pool.results(handles))

    seconds = sorted(timed(step) for _ in range(repeats))
    pool.close()
    return {"one_step_s": median(seconds), "one_step_p95_s": seconds[int(0.95 * repeats)]}


def main() -> None:
    config = compose(overrides=["data.generated.users=400"])
    with TemporaryDirectory() as folder:
        config.data.cache = str(Path(folder) / "catalog")
        catalog = build_catalog(config.data, str(prepare_model(config)))
        ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=2**29, log_to_driver=False)
        table = random_groups(GROUPS, catalog.num_classes)
        row = against_loops(catalog, table)
        figures = one_actor(catalog, table) | one_step(catalog)
        ray.shutdown()
    write_rows([row], "Rewards", {"rewards": figures})
    print(
        f"rule + ranking over {GROUPS:,} groups of {GROUP_SIZE} in one actor: {figures['inside_the_actor_s']:.3f} s "
        f"(limit {LIMIT_S} s), with transport, checks and the sum {figures['there_and_back_s']:.3f} s\n"
        f"one step of {STEP_GROUPS} groups in tables of {TABLE_GROUPS}: {1e3 * figures['one_step_s']:.1f} ms "
        f"(95%: {1e3 * figures['one_step_p95_s']:.1f} ms)"
    )


if __name__ == "__main__":
    main()
