"""A walk of the trie in plain Python: what masks and logits processors must equal."""

import numpy as np
import torch
from search_oracle import random_trie

from catalog.trie import Trie
from rollout.config import LogprobSpace
from rollout.trie_mask import ENDED

VOCABULARY = 40
TRIE = random_trie(3, 60, VOCABULARY, 9)


def walk(trie: Trie, node: int, tokens: list[int]) -> int | None:
    """A node, ENDED, or None where the tokens leave the trie."""
    for token in tokens:
        if node == ENDED:
            return ENDED
        target = trie.step(node, token)
        if target is None:
            return None
        node = max(target, ENDED)
    return node


def masked(trie: Trie, node: int, logits: torch.Tensor, space: LogprobSpace) -> torch.Tensor:
    """What a row of logits [V] must become at `node`."""
    expected = torch.full_like(logits, float("-inf"))
    if node == ENDED:
        expected[trie.eos_token] = 0.0
        return expected
    tokens = torch.from_numpy(trie.children(node)[0].astype(np.int64))
    normaliser = logits.logsumexp(0) if space == "vocabulary" else logits[tokens].logsumexp(0)
    expected[tokens] = logits[tokens] - normaliser
    return expected
