"""Beam search written plainly: one group, lists, no tensors. What the fast search must equal."""

import random
from collections.abc import Callable

import numpy as np
import torch

from catalog.trie import Trie

EOS = 0


def plain_beam_search(
    trie: Trie, logprobs: Callable[[int], np.ndarray], beams: int
) -> list[tuple[np.float32, int, list[int]]]:
    """(score, item class, tokens) of the pool, best first.

    logprobs(node): float32 [vocabulary] of the next token. Ties: the earlier beam, then the lower token.
    """
    running: list[tuple[np.float32, int, list[int]]] = [(np.float32(0), 0, [])]
    pool: list[tuple[np.float32, int, list[int]]] = []
    while running and not (len(pool) == beams and running[0][0] <= pool[-1][0]):
        candidates = [
            (np.float32(score + logprobs(node)[token]), int(target), [*tokens, int(token)])
            for score, node, tokens in running
            for token, target in zip(*trie.children(node), strict=True)
        ]
        candidates = sorted(candidates, key=lambda candidate: -candidate[0])[: 2 * beams]
        pool += [(s, -1 - target, tokens) for s, target, tokens in candidates[:beams] if target < 0]
        pool = sorted(pool, key=lambda finished: -finished[0])[:beams]
        running = [candidate for candidate in candidates if candidate[1] >= 0][:beams]
    return pool


def random_titles(seed: int, count: int, vocabulary: int, longest: int) -> list[list[int]]:
    """Distinct titles with shared beginnings, forced chains, and some that are beginnings of others."""
    draw = random.Random(seed)
    titles: set[tuple[int, ...]] = set()
    for _ in range(count):
        length = draw.randint(1, longest)
        title = [draw.randrange(1, vocabulary) for _ in range(min(length, draw.randint(1, 3)))]
        while len(title) < length:
            forced = draw.random() < 0.8
            title.append(
                1 + (len(title) * 7 + title[-1]) % (vocabulary - 1) if forced else draw.randrange(1, vocabulary)
            )
        titles.add(tuple(title))
        if draw.random() < 0.2:
            titles.add(tuple(title[: draw.randint(1, length)]))
    return [[*title, EOS] for title in sorted(titles)]


def random_trie(seed: int, count: int, vocabulary: int, longest: int) -> Trie:
    """The trie of random_titles."""
    titles = random_titles(seed, count, vocabulary, longest)
    return Trie.from_titles(titles, eos_token=EOS, tokenizer_fingerprint="none")


def class_probabilities(trie: Trie, logits: torch.Tensor, temperature: float) -> np.ndarray:
    """float64 [classes]: of the policy renormalised over the trie at every node."""
    probabilities = np.ones(trie.num_classes)
    for item_class in range(trie.num_classes):
        node = 0
        for token in trie.title_tokens(item_class):
            tokens, targets = trie.children(node)
            allowed = (logits[node, tokens.tolist()].double() / temperature).softmax(0).numpy()
            edge = tokens.tolist().index(token)
            probabilities[item_class] *= allowed[edge]
            node = int(targets[edge])
    return probabilities
