"""HR@K and NDCG@K from the rank of the target among the recommended titles, and how sure a difference is."""

from collections.abc import Hashable, Sequence

import numpy as np

MISS = -1
"""Rank of a target that was not recommended."""
RESAMPLES, FEWEST_RESAMPLES = 10_000, 1000
RESAMPLES_AT_ONCE = 256
DRAWN, DRAWN_AT_ONCE = 100_000_000, 1 << 24
"""Users that all resamples, and those that are drawn at once, hold together where there are many users."""


def hr_at_k(ranks: np.ndarray, k: int) -> float:
    """Hit rate: the share of targets among the first k. ranks int [n], 0 is the best, MISS a miss."""
    return float(_hits(ranks, k).mean())


def ndcg_at_k(ranks: np.ndarray, k: int) -> float:
    """Mean of 1 / log2(rank + 2) over n examples, 0 for a target not among the first k. ranks int [n], MISS a miss.

    With one relevant title per example the ideal DCG is 1, so DCG is NDCG.
    """
    return float(ndcg_per_example(ranks, k).mean())


def ndcg_per_example(ranks: np.ndarray, k: int) -> np.ndarray:
    """float64 [n]: the NDCG@k of each example; see ndcg_at_k."""
    hits = _hits(ranks, k)
    return np.where(hits, 1.0 / np.log2(np.where(hits, ranks, 0) + 2.0), 0.0)


def ranking_metrics(hit_rank: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """{"hr@1": ..., "ndcg@1": ..., ...} for each k of `ks`. hit_rank int [n], MISS a miss.

    Raises ValueError for no examples or a k below 1.
    """
    hit_rank = np.asarray(hit_rank)
    if not len(hit_rank):
        raise ValueError("metrics of no examples are undefined")
    if min(ks, default=1) < 1:
        raise ValueError(f"cut-offs must be 1 or more, got {list(ks)}")
    metrics = {f"hr@{k}": hr_at_k(hit_rank, k) for k in ks}
    return metrics | {f"ndcg@{k}": ndcg_at_k(hit_rank, k) for k in ks}


def paired_bootstrap(a: np.ndarray, b: np.ndarray, users: Sequence[Hashable], seed: int) -> dict[str, float | None]:
    """Mean of b - a over the examples with its 95% interval, from 10,000 resamples of the users.

    Of more than 10,000 users there are fewer resamples, 1,000 or more.

    a, b: float [n], the metric of each example before and after. users: [n], whose example it is: all examples of a
    user are resampled together, since they are not independent.
    Returns {"mean", "low", "high"}; of a single user there is no interval (None). Raises ValueError for different
    lengths or no examples.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a) or len(users) != len(a):
        raise ValueError(
            f"a paired bootstrap needs equally long, non-empty rows, got {a.shape}, {b.shape} and {len(users)} users"
        )
    gain = b - a
    _, user = np.unique(np.asarray(users), return_inverse=True)
    examples, gains = np.bincount(user), np.bincount(user, gain)
    if len(gains) == 1:
        return {"mean": float(gain.mean()), "low": None, "high": None}
    draw = np.random.default_rng(seed)
    means = []
    resamples = max(FEWEST_RESAMPLES, min(RESAMPLES, DRAWN // len(gains)))
    at_once = max(1, min(RESAMPLES_AT_ONCE, DRAWN_AT_ONCE // len(gains)))
    for first in range(0, resamples, at_once):
        drawn = draw.integers(len(gains), size=(min(at_once, resamples - first), len(gains)))
        means.append(gains[drawn].sum(axis=1) / examples[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return {"mean": float(gain.mean()), "low": float(low), "high": float(high)}


def _hits(ranks: np.ndarray, k: int) -> np.ndarray:
    ranks = np.asarray(ranks)
    return (ranks != MISS) & (ranks < k)
