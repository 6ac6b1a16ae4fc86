"""The actor that computes one or several reward terms."""

import os
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from catalog.catalog import Catalog
from rewards.config import RewardTerm
from rewards.errors import RewardError
from rewards.group import Groups
from rewards.interface import Reward, make_reward, score
from rewards.layout import Layout
from rewards.metrics import TERM, TOTAL, reward_metrics
from rewards.registry import resolve
from rewards.rule import rule_rewards
from rollout.groups import GROUP_SCHEMA
from rollout.metrics import rollout_metrics


class RewardActor:
    """Scores group tables with its terms; stateless between tables as far as this project is concerned.

    >>> actor = ray.remote(RewardActor).remote(terms, catalog_path, root)
    >>> columns, seconds = ray.get(actor.score.remote(table_ref, "train"))

    One actor per heavy term and replica scores; one for all light terms scores them, adds the columns of the others
    and the weighted sum, so that a run with only light terms makes a single hop.
    """

    def __init__(self, terms: Sequence[RewardTerm], catalog_path: str, root: str) -> None:
        """terms: what this actor computes. root: where the driver looks up modules and relative files."""
        self.terms = terms
        self.catalog_path = catalog_path
        self.root = Path(root)
        if self.root.is_dir():
            os.chdir(self.root)  # relative paths in a term's args mean what they mean to the driver

    @cached_property
    def catalog(self) -> Catalog:
        return Catalog.load(self.catalog_path)

    @cached_property
    def rewards(self) -> dict[str, Reward]:
        """Made on first use and not in __init__, so that an error reaches the driver as it was raised."""
        return {
            term.key: make_reward(term.key, resolve(term.name, self.root), self.catalog, dict(term.args))
            for term in self.terms
        }

    def ready(self) -> None:
        """Make the rewards (load models, open connections) and warm Arrow, whose first array imports pandas."""
        _ = self.rewards
        rule_rewards(GROUP_SCHEMA.empty_table())

    def score(self, table: pa.Table, split: str) -> tuple[dict[str, pa.ListArray], dict[str, float]]:
        """list<float32> of one row per group and the seconds it took, both by term. Raises RewardError."""
        columns, seconds = {}, {}
        for key, reward in self.rewards.items():
            started = time.perf_counter()
            columns[key] = score(key, reward, Groups(table, self.catalog, split))  # its own, whatever it does to them
            seconds[key] = time.perf_counter() - started
        return columns, seconds

    def combine(
        self,
        table: pa.Table,
        split: str,
        weights: dict[str, float],
        *scored: tuple[dict[str, pa.ListArray], dict[str, float]],
    ) -> tuple[pa.Table, dict[str, float]]:
        """`table` with the column reward/<term> of every term and their weighted sum `reward`; seconds by term.

        weights: factor of every term, in the order of the columns. scored: what `score` of the other actors returned.
        """
        columns, seconds = self.score(table, split)
        for other_columns, other_seconds in scored:
            columns |= other_columns
            seconds |= other_seconds
        layout = Layout.of(table)
        total = np.zeros(layout.num_candidates, np.float32)
        for key, weight in weights.items():
            table = table.append_column(TERM + key, columns[key])
            total += np.float32(weight) * layout.flat(columns[key])
        if not np.isfinite(total).all():
            raise RewardError(f"the weighted sum of the rewards overflows float32; their weights are {weights}")
        return table.append_column(TOTAL, layout.column(total)), seconds

    def metrics(self, *tables: pa.Table) -> dict[str, float]:
        """reward_metrics and rollout_metrics of scored tables: here, since no table comes to the driver."""
        return reward_metrics(tables) | rollout_metrics(tables)
