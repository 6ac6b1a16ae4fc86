"""The ranking reward: wrong candidates are punished by how high the beam search ranked them."""

from typing import Literal, get_args

import numpy as np
import pyarrow as pa

from rewards.errors import RewardError
from rewards.group import Groups, TitleCatalog
from rewards.layout import Layout
from rewards.rule import hits

Formula = Literal["published", "paper"]


def ranking_rewards(table: pa.Table, formula: Formula = "published") -> pa.ListArray:
    """list<float32>, one row per group: 0 for a hit, -w_i / S for a wrong candidate at rank i, w_i = 1 / log2(i + 2).

    published: S sums w over all ranks of the group, and a group without a hit gets 0 throughout, as in the published
    code. paper: S sums w over the wrong candidates, and every group counts (arXiv 2510.12211, Eq. 7-9); training
    with it was seen to collapse. Needs the columns `candidate_class` and `target_class`. Raises
    RewardError for any other formula.
    """
    _check(formula)
    layout = Layout.of(table)
    hit = hits(table, layout)
    weight = 1.0 / np.log2(layout.rank + 2.0)
    if formula == "published":
        punished = ~hit & layout.any(hit)[layout.group]
        total = layout.sum(weight)
    else:
        punished = ~hit
        total = layout.sum(np.where(hit, 0.0, weight))
    return layout.column(np.divide(-weight, total[layout.group], out=np.zeros_like(weight), where=punished))


class Ranking:
    """The registered rewards `ranking`, to be added to `rule`, and `ranking_only`, to stand alone."""

    light = True

    def __init__(self, catalog: TitleCatalog, formula: Formula = "published") -> None:
        _check(formula)
        self.formula = formula

    def __call__(self, groups: Groups) -> pa.ListArray:
        return ranking_rewards(groups.table, self.formula)


def _check(formula: str) -> None:
    if formula not in get_args(Formula):
        raise RewardError(f"a ranking reward's formula {formula!r} is none of {', '.join(get_args(Formula))}")
