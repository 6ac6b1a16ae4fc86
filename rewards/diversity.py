"""The diversity reward: a candidate counts less, the more it resembles what is ranked above it."""

import re

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array

from rewards.group import Groups, TitleCatalog, all_titles

WORD = re.compile(r"\w+")


class Diversity:
    """The registered reward `diversity`: 1 - the greatest similarity to any better-ranked candidate.

    Similarity of two titles is the Jaccard index of their words, regardless of case. The candidate at rank 0 gets 1,
    the same title again gets 0, and a candidate that is no title gets 0.
    """

    light = True

    def __init__(self, catalog: TitleCatalog) -> None:
        self.words = title_words(all_titles(catalog))

    def __call__(self, groups: Groups) -> pa.ListArray:
        layout = groups.layout
        classes = layout.flat(groups.table["candidate_class"])
        valid = classes >= 0
        nearest = np.zeros(layout.num_candidates)
        for above in range(1, int(layout.sizes.max(initial=0))):
            below = np.flatnonzero(layout.rank >= above)
            below = below[valid[below] & valid[below - above]]
            same = classes[below] == classes[below - above]  # also of titles without words
            similar = np.where(same, 1.0, jaccard(self.words, classes[below], classes[below - above]))
            nearest[below] = np.maximum(nearest[below], similar)
        return layout.column(np.where(valid, 1.0 - nearest, 0.0))


def title_words(titles: list[str]) -> csr_array:
    """float32 [titles, words]: 1 where the title has the word."""
    vocabulary: dict[str, int] = {}
    found = [
        sorted({vocabulary.setdefault(word, len(vocabulary)) for word in WORD.findall(t.lower())}) for t in titles
    ]
    start = np.cumsum([0, *map(len, found)])
    words = np.fromiter((word for row in found for word in row), np.int64, int(start[-1]))
    return csr_array((np.ones(len(words), np.float32), words, start), shape=(len(titles), len(vocabulary)))


def jaccard(words: csr_array, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 [n]: shared words over all words of the titles a[i] and b[i]; 0 where neither has any."""
    sizes = np.diff(words.indptr)
    shared = np.asarray(words[a].multiply(words[b]).sum(axis=1)).ravel()
    return shared / np.maximum(sizes[a] + sizes[b] - shared, 1)
