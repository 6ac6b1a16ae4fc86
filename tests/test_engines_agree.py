"""A rollout worker streams the same groups whichever engine it has."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import ray
from engine_fixtures import engine_of

from catalog.catalog import Catalog
from rollout.actor import RolloutWorker, group_seed
from rollout.config import RolloutConfig, Strategy
from rollout.groups import INCLUSION_WEIGHT
from rollout.published_weights import PublishedWeights
from rollout.streams import collect, stream_rollout
from rollout.weights import WeightBucket, checksum

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def test_a_rollout_worker_with_the_other_engine_streams_the_same_groups(
    ray_session: None, small_catalog: Catalog, tiny_model_dir: Path, model: Any
) -> None:
    """Actor, streams, weights and the worker engine together, against the requests engine in this process."""
    ids = list(range(10))
    config = RolloutConfig(group_size=8, groups_per_table=4, kv_cache_gib=0.05, max_completion_tokens=10)
    worker = RolloutWorker.options(num_cpus=0).remote(0, str(tiny_model_dir), str(small_catalog.path), config)
    tensors = list(model.named_parameters())
    weights = PublishedWeights(3, [ray.put(WeightBucket.pack([named])) for named in tensors], checksum(tensors))
    assert ray.get(weights.load(worker), timeout=120) == weights.checksum
    engine = engine_of(tiny_model_dir, small_catalog.path / "trie.arrow", engine="requests", max_completion_tokens=10)
    seeds = [group_seed(0, 3, i) for i in ids]
    for strategy in STRATEGIES:
        stream = stream_rollout(worker, 0, "train", ids, 3, 0, config, strategy=strategy, weights=weights)
        rows = pa.concat_tables([ray.get(table) for _, table in collect([stream], 120)]).to_pylist()
        assert [row["example_id"] for row in rows] == ids
        prompts, targets = [row["prompt_tokens"] for row in rows], [row["target_class"] for row in rows]
        groups = engine.generate(prompts, seeds, targets, group_size=8, strategy=strategy)
        for row, group in zip(rows, groups, strict=True):
            assert row["candidate_class"] == group.item_class.tolist()
            assert row["candidate_tokens"] == [tokens.tolist() for tokens in group.tokens]
            np.testing.assert_allclose(row["score"], group.score, atol=5e-4)
            if strategy == "stochastic_beam":
                np.testing.assert_allclose(row[INCLUSION_WEIGHT], group.inclusion_weight, rtol=1e-2)
            for theirs, ours in zip(row["candidate_logprobs"], group.logprobs, strict=True):
                np.testing.assert_allclose(theirs, ours, atol=1e-4)
    ray.kill(worker)
