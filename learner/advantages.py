"""Advantages: how much better a candidate's reward is than the others'. Groups may have different sizes.

All functions take rewards as one float array [G_i] per group and return float32 arrays of the same lengths. They are
exactly zero for a group whose rewards are all equal, so that `informative` can tell such groups from the rest.
"""

from collections.abc import Sequence

import numpy as np

Advantages = list[np.ndarray]
STD_EPSILON = 1e-4


def group_advantages(rewards: Sequence[np.ndarray], normalize_std: bool = True) -> Advantages:
    """(r - mean) / (std + 1e-4) within each group, unbiased std (DeepSeekMath, arXiv 2402.03300, 4.1.2).

    Without `normalize_std` only the mean is subtracted (Dr. GRPO, arXiv 2503.20783).
    """
    return [_standardize(np.asarray(group, np.float64), normalize_std) for group in rewards]


def leave_one_out_advantages(rewards: Sequence[np.ndarray]) -> Advantages:
    """r minus the mean of the group's other rewards (RLOO, arXiv 2402.14740); 0 for a group of one."""
    return [
        centered * np.float32(len(centered) / max(len(centered) - 1, 1))
        for centered in group_advantages(rewards, normalize_std=False)
    ]


def rank_advantages(rewards: Sequence[np.ndarray], normalize_std: bool = True) -> Advantages:
    """Each rank is compared with the same rank of the other lists of the update (Rank-GRPO, arXiv 2510.20150).

    Lists whose rewards are all equal say nothing about their ranks: they get 0 and take no part in the comparison.
    A rank that only one list of the update reaches gets 0.
    """
    advantages = [np.zeros(len(group), np.float32) for group in rewards]
    lists = [row for row, group in enumerate(rewards) if len(group) and np.ptp(group) > 0]
    for rank in range(max((len(rewards[row]) for row in lists), default=0)):
        reached = [row for row in lists if len(rewards[row]) > rank]
        at_rank = np.asarray([rewards[row][rank] for row in reached], np.float64)
        for row, advantage in zip(reached, _standardize(at_rank, normalize_std), strict=True):
            advantages[row][rank] = advantage
    return advantages


def informative(advantages: Sequence[np.ndarray]) -> np.ndarray:
    """bool [n]: groups with at least one advantage that is not zero."""
    return np.fromiter((bool(np.any(group)) for group in advantages), bool, len(advantages))


def _standardize(rewards: np.ndarray, normalize_std: bool) -> np.ndarray:
    if len(rewards) < 2 or np.ptp(rewards) == 0:
        return np.zeros(len(rewards), np.float32)
    centered = rewards - rewards.mean()
    scale = rewards.std(ddof=1) + STD_EPSILON if normalize_std else 1.0
    return (centered / scale).astype(np.float32)
