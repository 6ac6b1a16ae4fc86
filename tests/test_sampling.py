"""Independent samples follow the constrained policy, and share what they have in common."""

from collections import Counter
from itertools import pairwise, product

import numpy as np
import torch
from search_oracle import EOS, class_probabilities, random_trie

from catalog.trie import Trie
from rollout.device_trie import DeviceTrie
from rollout.free_sampling import FreeSampleSearch
from rollout.groups import Candidates
from rollout.sampling import SampleSearch


def draw(
    trie: Trie, logits: torch.Tensor, seeds: range, size: int, temperature: float = 1.0
) -> tuple[list[Candidates], list[int]]:
    """One group per seed, all with the model logits[node], and how many nodes were scored in each step."""
    search, scored = SampleSearch(DeviceTrie.of(trie), seeds, size, temperature), []
    while (frontier := search.frontier()).size:
        scored.append(frontier.size)
        search.advance(frontier, search.children(frontier, slice(None), logits[frontier.node]))
    return search.results(), scored


def test_samples_follow_the_policy() -> None:
    trie = random_trie(4, 12, 20, 6)
    logits = torch.randn(trie.num_nodes, 20, generator=torch.Generator().manual_seed(1))
    for temperature in (1.0, 0.6):
        groups, _ = draw(trie, logits, range(4000), 8, temperature)
        p = class_probabilities(trie, logits, temperature)
        counts = np.bincount(np.concatenate([group.item_class for group in groups]), minlength=len(p))
        deviation = (counts - 32_000 * p) / np.sqrt(32_000 * p * (1 - p))
        assert np.abs(deviation).max() < 4.5


def test_samples_are_titles_with_their_logprobs() -> None:
    trie = random_trie(2, 60, 20, 8)
    logits = torch.randn(trie.num_nodes, 20, generator=torch.Generator().manual_seed(0))
    logprobs = logits.log_softmax(-1).numpy()
    groups, _ = draw(trie, logits, range(20), 16, temperature=0.7)
    for group in groups:
        for item_class, tokens, own in zip(group.item_class, group.tokens, group.logprobs, strict=True):
            assert tokens.tolist() == trie.title_tokens(int(item_class))
            node, expected = 0, []
            for token in tokens.tolist():
                expected.append(logprobs[node, token])
                node = trie.step(node, token) or 0
            np.testing.assert_allclose(own, expected, atol=1e-5)


def test_equal_samples_are_scored_once() -> None:
    titles = [[1, 2, 3, 4, EOS], [5, 6, EOS]]
    trie = Trie.from_titles(titles, eos_token=EOS, tokenizer_fingerprint="")
    groups, scored = draw(trie, torch.zeros(trie.num_nodes, 10), range(7), 32)
    assert scored[0] == 7
    assert max(scored) == 14
    assert all(set(group.item_class.tolist()) == {0, 1} for group in groups)


def test_a_group_is_a_function_of_its_seed_alone() -> None:
    trie = random_trie(2, 60, 20, 8)
    logits = torch.randn(trie.num_nodes, 20, generator=torch.Generator().manual_seed(0))
    together, _ = draw(trie, logits, range(10), 8)
    for seed, group in enumerate(together):
        alone, _ = draw(trie, logits, range(seed, seed + 1), 8)
        np.testing.assert_array_equal(alone[0].item_class, group.item_class)
    assert len({tuple(group.item_class.tolist()) for group in together}) == 10


def test_free_samples_follow_the_model() -> None:
    """Every text of a small vocabulary, against its probability; the logits depend on the last token alone."""
    trie = Trie.from_titles([[1, EOS], [2, 1, EOS]], eos_token=EOS, tokenizer_fingerprint="")
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    for temperature in (1.0, 0.6):
        search = FreeSampleSearch(DeviceTrie.of(trie), range(4000), 8, temperature, max_tokens=3)
        while (frontier := search.frontier()).size:
            search.advance(frontier, search.children(frontier, slice(None), logits[frontier.token.long()]))
        groups = search.results()
        found = Counter(tuple(tokens.tolist()) for group in groups for tokens in group.tokens)
        p = (logits.double() / temperature).softmax(-1).tolist()
        texts = [text for text in product(range(4), repeat=3) if EOS not in text[:2]]
        texts += [(EOS,), *((first, EOS) for first in range(1, 4))]
        for text in texts:
            q = np.prod([p[before][token] for before, token in pairwise((0, *text))])
            assert abs(found[text] - 32_000 * q) < 4.5 * np.sqrt(32_000 * q * (1 - q))
        assert sum(found.values()) == sum(found[text] for text in texts)
        own = logits.log_softmax(-1).numpy()
        for group in groups[:20]:
            for item_class, tokens, logprobs in zip(group.item_class, group.tokens, group.logprobs, strict=True):
                assert item_class == trie.classify(tokens.tolist())
                expected = [own[before, token] for before, token in pairwise((0, *tokens.tolist()))]
                np.testing.assert_allclose(logprobs, expected, atol=1e-5)
