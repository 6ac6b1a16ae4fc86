"""The collaborative reward: how much a sequential recommender likes the candidate after the history."""

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import torch

from rewards.errors import RewardError
from rewards.group import NO_TITLE, Groups, TitleCatalog, all_titles
from rewards.sasrec import check_finite, load_sasrec

Output = Literal["scores", "ranks", "probabilities"]


class Collaborative:
    """The registered reward `collaborative`: a SASRec model's opinion of each candidate given the history.

    scores: the model's logits. ranks: 1 / log2(rank + 2) of the candidate among all item classes, rank 0 the best.
    probabilities: softmax of the logits over all item classes. A candidate that is no title gets the lowest logit, or
    0 for the other two. `model` is a file that `make sasrec` wrote for the same catalogue.
    """

    def __init__(
        self, catalog: TitleCatalog, model: str, output: Output = "scores", device: str | None = None
    ) -> None:
        """Raises RewardError for an unknown output or a model that is missing or of another catalogue."""
        if output not in get_args(Output):
            raise RewardError(f"reward 'collaborative': output {output!r} is none of {', '.join(get_args(Output))}")
        self.output = output
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_sasrec(Path(model), all_titles(catalog)).to(self.device)

    @torch.no_grad()
    def __call__(self, groups: Groups) -> pa.ListArray:
        examples = groups.catalog.examples(groups.split)
        histories = [examples.history_classes(example_id) for example_id in groups.example_ids.tolist()]
        logits = self.model(self.model.pad(histories).to(self.device))
        check_finite(logits, "a score")
        opinion = opinions(logits, self.output).cpu().numpy()
        classes = groups.layout.flat(groups.table["candidate_class"])
        values = opinion[groups.layout.group, classes]
        lowest = opinion.min(axis=1)[groups.layout.group] if self.output == "scores" else 0.0
        return groups.layout.column(np.where(classes == NO_TITLE, lowest, values))


def opinions(logits: torch.Tensor, output: Output) -> torch.Tensor:
    """float32 [n, classes] -> float32 [n, classes]; see Collaborative."""
    if output == "probabilities":
        return logits.softmax(dim=1)
    if output == "ranks":
        rank = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return 1.0 / torch.log2(rank + 2.0)
    return logits
