"""Rewards and advantages against the published code's."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from learner.advantages import group_advantages
from learner.parity.comparison import Comparison, difference
from learner.parity.golden import GoldenSet
from rewards.ranking import ranking_rewards
from rewards.rule import rule_rewards

SETTINGS = {"rule": ("rule",), "ranking": ("rule", "ranking"), "rankingOnly": ("ranking",)}
"""The published reward types as sums of ours."""
PUBLISHED_NAMES = {"rule": "rule_reward", "ranking": "ndcg_rule_reward"}


def group_rewards(candidate_classes: list[list[int]], target_classes: list[int]) -> dict[str, np.ndarray]:
    """Each of our rewards, float64 [n, G], of groups of one size."""
    table = pa.table(
        {
            "candidate_class": pa.array(candidate_classes, pa.list_(pa.int32())),
            "target_class": pa.array(target_classes, pa.int32()),
        }
    )
    columns = {"rule": rule_rewards(table), "ranking": ranking_rewards(table)}
    return {name: np.asarray(column.to_pylist(), np.float64) for name, column in columns.items()}


def compare_rewards(golden: GoldenSet) -> Iterator[Comparison]:
    """rewards.json: every reward type on hand-made groups, some with titles that do not exist."""
    with golden.reading("rewards.json"):
        groups = golden.json("rewards.json")["groups"]
        classes = [golden.classes(group["item_ids"]) for group in groups]
        targets = golden.classes([group["target_item_id"] for group in groups])
        classified = [[golden.trie.classify(tokens) for tokens in group["completion_token_ids"]] for group in groups]
        yield difference("rewards: item class of the completions", classified, classes, 0.0)
        terms = group_rewards(classes, targets)
        for setting, names in SETTINGS.items():
            results = [group["results"][setting] for group in groups]
            for name in names:
                published = [result["per_function"][PUBLISHED_NAMES[name]] for result in results]
                yield difference(f"rewards {setting}: {name}", terms[name], published, 1e-6)
            rewards = np.sum([terms[name] for name in names], axis=0)
            yield difference(f"rewards {setting}: sum", rewards, [result["rewards"] for result in results], 1e-6)
            advantages = group_advantages(list(rewards))
            published = [result["advantages"] for result in results]
            yield difference(f"rewards {setting}: advantages", advantages, published, 1e-5)
