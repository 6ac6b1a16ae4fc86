"""Ranking metrics of the current policy on a split, by constrained beam search."""

import numpy as np
import pyarrow as pa
import ray

from catalog.catalog import Catalog
from catalog.metrics import MISS
from launch.config import Config
from launch.progress import Stage
from launch.rollout_fleet import RolloutFleet
from launch.waiting import fetch
from rewards.group import NO_TITLE
from rewards.layout import Layout
from rewards.rule import hits


def eval_examples(config: Config, catalog: Catalog, split: str) -> np.ndarray:
    """int64 [n]: the evaluated rows of a split, evenly spaced over it; all of them where eval_examples is 0."""
    available = len(catalog.examples(split))
    wanted = config.train.eval_examples or available
    return np.unique(np.linspace(0, available - 1, min(wanted, available)).round().astype(np.int64))


def evaluate(
    fleet: RolloutFleet, config: Config, split: str, example_ids: np.ndarray, stage: Stage | None = None
) -> tuple[np.ndarray, int]:
    """(int64 [n]: rank of each example's target in the beams or MISS; number of candidates that are no title)."""
    flight = fleet.launch(split, example_ids, config.train.seed, group_size=config.train.eval_beams, strategy="beam")
    rank_of: dict[int, int] = {}
    invalid = 0
    for _, table in fleet.land(flight):
        ids, ranks, wrong = fetch(_hit_ranks.remote(table), config.rollout.timeout_s, "counting the hits of a table")
        rank_of.update(zip(ids.tolist(), ranks.tolist(), strict=True))
        invalid += wrong
        if stage is not None:
            stage.update(len(rank_of))
    return np.array([rank_of[int(example)] for example in example_ids], np.int64), invalid


def hit_ranks(groups: pa.Table) -> np.ndarray:
    """int64 [n]: the first rank at which each group holds its target, MISS where it does not."""
    layout = Layout.of(groups)
    hit = hits(groups, layout)
    found, first = np.unique(layout.group[hit], return_index=True)
    ranks = np.full(layout.num_groups, MISS)
    ranks[found] = layout.rank[hit][first]
    return ranks


@ray.remote(num_cpus=0)
def _hit_ranks(groups: pa.Table) -> tuple[np.ndarray, np.ndarray, int]:
    """The only numbers of an evaluation that reach the driver: (example ids, hit ranks, invalid candidates)."""
    invalid = int((Layout.of(groups).flat(groups["candidate_class"]) == NO_TITLE).sum())
    return groups["example_id"].to_numpy(), hit_ranks(groups), invalid
