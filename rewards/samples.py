"""A handful of groups to try a reward on, without data and without a model."""

from collections.abc import Sequence

import numpy as np

from catalog.catalog import Catalog
from rewards.errors import RewardError
from rewards.group import NO_TITLE, Groups
from rollout.groups import Candidates, group_table

TITLES = (
    "Steel Hex Bolt, 3 inch, Pack of 10",
    "Steel Hex Bolt, 4 inch, Pack of 10",
    "Steel Hex Nut, Pack of 50",
    "Copper Wire 12 AWG, 100 ft",
    "Copper Wire 14 AWG, 100 ft",
    "Digital Caliper, 6 inch",
    "PLA Filament, 1.75 mm, Silver",
    "PLA Filament, 1.75 mm, Gold",
    "Nitrile Gloves, Large, Box of 100",
    "Safety Glasses, Clear",
)
"""Titles by item class."""
EXAMPLES = (
    ("ann", (2,), 0),
    ("ben", (3, 4), 5),
    ("cleo", (6,), 7),
    ("dan", (8, 9, 5), 8),
)
"""User, history and target of each example."""
CANDIDATES = (
    (0, 1, 2, 3, 4, 5),
    (4, 3, 9, 5, 0, 2),
    (6, 9, 1, 0, 8, 3),
    (9, NO_TITLE, 8, 5, 6, 7),
)
"""Item classes of each example's candidates: a hit at rank 0, at rank 3, none, and one that is no title."""


class SampleExamples:
    """The examples of the sample catalogue; see catalog.catalog.Examples."""

    target_class = np.array([target for _, _, target in EXAMPLES], np.int32)

    def __len__(self) -> int:
        return len(EXAMPLES)

    def user_id(self, i: int) -> str:
        return EXAMPLES[i][0]

    def history_classes(self, i: int) -> Sequence[int]:
        return EXAMPLES[i][1]


class SampleCatalog:
    """Ten titles and four users; see catalog.catalog.Catalog."""

    num_classes = len(TITLES)

    def title(self, item_class: int) -> str:
        return TITLES[item_class]

    def examples(self, split: str) -> SampleExamples:
        return SampleExamples()


def sample_groups() -> Groups:
    """Four groups of six candidates of the sample catalogue, with the bytes of texts for tokens."""
    prompts = [_bytes("; ".join(TITLES[c] for c in history)) for _, history, _ in EXAMPLES]
    targets = [target for _, _, target in EXAMPLES]
    groups = [
        _candidates(classes, [_bytes("no such title" if c == NO_TITLE else TITLES[c]) for c in classes])
        for classes in CANDIDATES
    ]
    return Groups(group_table(range(len(EXAMPLES)), 0, prompts, targets, groups), SampleCatalog(), "train")


def groups_of_catalog(catalog: Catalog, split: str, count: int, size: int, seed: int = 0) -> Groups:
    """`count` groups of `size` distinct random titles, the target among them in every second one.

    Fewer where the split or the catalogue is smaller. Raises RewardError for a count or size below 1.
    """
    if count < 1 or size < 1:
        raise RewardError(f"a reward is tried on 1 group of 1 candidate or more, not on {count} of {size}")
    draw = np.random.default_rng(seed)
    examples = catalog.examples(split)
    rows = draw.choice(len(examples), size=min(count, len(examples)), replace=False).tolist()
    targets = [int(examples.target_class[row]) for row in rows]
    groups = []
    for index, target in enumerate(targets):
        classes = draw.choice(catalog.num_classes, size=min(size, catalog.num_classes), replace=False)
        if index % 2 == 0 and target not in classes:
            classes[draw.integers(len(classes))] = target
        groups.append(_candidates(classes, [catalog.trie.title_tokens(item_class) for item_class in classes.tolist()]))
    prompts = [examples.prompt_tokens(row) for row in rows]
    return Groups(group_table(rows, 0, prompts, targets, groups), catalog, split)


def _candidates(classes: Sequence[int] | np.ndarray, tokens: Sequence[Sequence[int]]) -> Candidates:
    """Candidates with made-up log-probabilities: summing to -0.5 at rank 0 and to 0.5 less at each further rank."""
    arrays = [np.asarray(sequence, np.int32) for sequence in tokens]
    logprobs = [np.full(len(array), -0.5 * (rank + 1) / len(array), np.float32) for rank, array in enumerate(arrays)]
    scores = np.array([values.sum() for values in logprobs], np.float32)
    return Candidates(arrays, logprobs, np.asarray(classes, np.int32), scores)


def _bytes(text: str) -> list[int]:
    return list(text.encode())
