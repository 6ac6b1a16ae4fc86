"""What a built catalogue is like, in numbers that say what a rollout will cost."""

from typing import Any

import numpy as np

from catalog.ragged import Ragged
from catalog.trie import Trie


def catalog_stats(
    items: int, trie: Trie, title_tokens: Ragged, prompt_lengths: dict[str, np.ndarray], max_prompt_tokens: int
) -> dict[str, Any]:
    """prompt_lengths: tokens of the prompts of each split before truncation to max_prompt_tokens."""
    lengths = np.concatenate(list(prompt_lengths.values()))
    return {
        "items": items,
        "classes": trie.num_classes,
        "examples": {name: len(split) for name, split in prompt_lengths.items()},
        "trie": trie_stats(trie),
        "title_tokens": _spread(title_tokens.lengths),
        "prompt_tokens": _spread(np.minimum(lengths, max_prompt_tokens)),
        "truncated_prompts": int((lengths > max_prompt_tokens).sum()),
    }


def trie_stats(trie: Trie) -> dict[str, Any]:
    """Size of the trie, and the mean and largest number of children by depth."""
    children = np.diff(trie.first_edge)
    totals = np.add.reduceat(children, trie.level_start[:-1])
    return {
        "nodes": trie.num_nodes,
        "depth": trie.max_tokens,
        "mean_branching": [round(float(mean), 3) for mean in totals / np.diff(trie.level_start)],
        "max_branching": trie.fanout_by_depth.tolist(),
    }


def _spread(lengths: np.ndarray) -> dict[str, float]:
    return {"mean": float(lengths.mean()), "p95": float(np.quantile(lengths, 0.95)), "max": int(lengths.max())}
