"""The popularity reward: a hit counts more, the rarer the target is."""

import numpy as np
import pyarrow as pa

from rewards.errors import RewardError
from rewards.group import Groups, TitleCatalog
from rewards.rule import hits


class Popularity:
    """The registered reward `popularity`: the rule reward weighted by the target's inverse propensity.

    An item class chosen n times in the train split has propensity (n + 1)^power, as in the unbiased evaluation of
    Yang et al. (RecSys 2018), where popular items are the ones that users get to see. Weights are scaled to a mean of
    1 over the train examples, and no weight exceeds `most` times the smallest.
    """

    light = True

    def __init__(self, catalog: TitleCatalog, power: float = 0.5, most: float = 10.0) -> None:
        """Raises RewardError for a power below 0 or a `most` below 1."""
        if power < 0 or most < 1:
            raise RewardError(f"reward 'popularity': power={power} must be 0 or more and most={most} 1 or more")
        chosen = np.bincount(catalog.examples("train").target_class, minlength=catalog.num_classes)
        self.weight = inverse_propensity(chosen, power, most)

    def __call__(self, groups: Groups) -> pa.ListArray:
        target = groups.table["target_class"].to_numpy()
        weight = self.weight[target].astype(np.float32)
        return groups.layout.column(hits(groups.table, groups.layout) * weight[groups.layout.group])


def inverse_propensity(chosen: np.ndarray, power: float, most: float) -> np.ndarray:
    """float64 [C]: the weight of a hit on each item class, from how often it was chosen, int [C]; see Popularity."""
    weight = (chosen + 1.0) ** -power
    weight = np.minimum(weight, most * weight.min())
    return weight / np.average(weight, weights=chosen if chosen.any() else None)
