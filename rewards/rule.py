"""The rule reward: 1 for the target, 0 for every other candidate."""

import numpy as np
import pyarrow as pa

from rewards.group import Groups, TitleCatalog
from rewards.layout import Layout


def hits(table: pa.Table, layout: Layout) -> np.ndarray:
    """bool [N]: which candidates are their group's target. Titles that several items share are one item class."""
    target = table["target_class"].to_numpy()
    return layout.flat(table["candidate_class"]) == target[layout.group]


def rule_rewards(table: pa.Table) -> pa.ListArray:
    """list<float32> of one row per group: 1 where the candidate is the target, else 0.

    Needs the columns `candidate_class` and `target_class`.
    """
    layout = Layout.of(table)
    return layout.column(hits(table, layout))


class Rule:
    """The registered reward `rule`."""

    light = True

    def __init__(self, catalog: TitleCatalog) -> None:
        pass

    def __call__(self, groups: Groups) -> pa.ListArray:
        return rule_rewards(groups.table)
