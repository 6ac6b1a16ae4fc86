"""What is logged about rewards, under the names that the ecosystem's dashboards know."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from rewards.layout import Layout
from rewards.rule import hits

TOTAL = "reward"
"""Column of the weighted sum of all terms."""
TERM = "reward/"
"""Beginning of the column of a term, before its weight; its name follows."""


def reward_metrics(tables: Sequence[pa.Table]) -> dict[str, float]:
    """Metrics over the groups of scored tables (columns `reward` and `reward/<name>`); {} without any group.

    reward: mean over candidates. reward_std: mean over groups of the standard deviation within (unbiased; 0 for one
    candidate). frac_reward_zero_std: share of groups whose rewards are all equal, which teach nothing.
    rewards/<name>/mean and /std: of each term over all candidates, before its weight. groups_with_hit: share of groups
    that hold the target. invalid_candidates: number of candidates that are no title. hits/rank_<i>: share of groups
    whose candidate at rank i is the target.
    """
    tables = [table for table in tables if table.num_rows]
    if not tables:
        return {}
    table = pa.concat_tables(tables)
    layout = Layout.of(table)
    reward = layout.flat(table[TOTAL]).astype(np.float64)
    std = _std_within(layout, reward)
    hit = hits(table, layout)
    metrics = {
        "reward": float(reward.mean()),
        "reward_std": float(std.mean()),
        "frac_reward_zero_std": float((std < 1e-8).mean()),
        "groups_with_hit": float(layout.any(hit).mean()),
        "invalid_candidates": float((layout.flat(table["candidate_class"]) < 0).sum()),
    }
    for name in table.column_names:
        if name.startswith(TERM):
            values = layout.flat(table[name]).astype(np.float64)
            metrics[f"rewards/{name.removeprefix(TERM)}/mean"] = float(values.mean())
            metrics[f"rewards/{name.removeprefix(TERM)}/std"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    at_rank = np.bincount(layout.rank[hit], minlength=int(layout.sizes.max()))
    return metrics | {f"hits/rank_{rank}": count / layout.num_groups for rank, count in enumerate(at_rank.tolist())}


def _std_within(layout: Layout, values: np.ndarray) -> np.ndarray:
    """float64 [n]: the unbiased standard deviation of values [N] within each group."""
    size = np.maximum(layout.sizes, 1)
    deviation = values - (layout.sum(values) / size)[layout.group]
    return np.sqrt(layout.sum(deviation**2) / np.maximum(size - 1, 1))
