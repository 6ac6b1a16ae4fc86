"""Training of SASRec on a catalogue's own examples, stopped early on its validation split."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from catalog.metrics import ranking_metrics
from rewards.errors import RewardError
from rewards.group import Examples, TitleCatalog, all_titles
from rewards.sasrec import SASRec, SASRecShape, check_finite, save_sasrec

KS = (1, 5, 10, 20)
"""Cut-offs of the reported HR and NDCG."""
CHOSEN_BY = "ndcg@10"
"""Metric of the validation split that decides which epoch is kept."""


@dataclass(frozen=True)
class SASRecTraining:
    """How SASRec is trained."""

    epochs: int = 100
    # Most passes over the train split.
    patience: int = 5
    # Epochs without a better validation metric after which training stops.
    batch: int = 256
    # Examples per step.
    lr: float = 1e-3
    # Learning rate of Adam.
    seed: int = 0
    # Seed of the weights, the order and the dropout.

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.patience < 0 or self.batch < 1 or not 0 < self.lr < math.inf:
            raise RewardError(
                f"SASRec: epochs={self.epochs} and batch={self.batch} must be 1 or more, patience={self.patience} 0 "
                f"or more, and lr={self.lr} greater than 0 and finite"
            )


def train_sasrec(
    catalog: TitleCatalog,
    file: Path,
    training: SASRecTraining | None = None,
    log: Callable[[str], None] = print,
    **shape: int | float,
) -> dict[str, float]:
    """Train with full cross-entropy, write the best epoch to `file`, return {"valid/hr@1": .., "test/ndcg@20": ..}.

    shape: fields of SASRecShape other than num_classes. log: told of every epoch. Raises RewardError for an empty
    split, or a model that diverges.
    """
    training = training or SASRecTraining()
    torch.manual_seed(training.seed)
    model = SASRec(SASRecShape(num_classes=catalog.num_classes, **shape))  # type: ignore[arg-type]
    splits = {split: _split(model, catalog.examples(split), split) for split in ("train", "valid", "test")}
    optimizer = torch.optim.Adam(model.parameters(), lr=training.lr)
    order = torch.Generator().manual_seed(training.seed)
    best, best_epoch, best_weights = -1.0, 0, model.state_dict()
    for epoch in range(1, training.epochs + 1):
        loss = _epoch(model, optimizer, *splits["train"], training.batch, order)
        if not math.isfinite(loss):
            raise RewardError(f"SASRec: the loss is {loss} after epoch {epoch}; lower the learning rate")
        valid = evaluate(model, *splits["valid"])
        log(f"epoch {epoch}: loss {loss:.4f}  valid {_words(valid)}")
        if valid[CHOSEN_BY] > best:
            best, best_epoch, best_weights = valid[CHOSEN_BY], epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= training.patience:
            break
    model.load_state_dict(best_weights)
    metrics = {
        f"{split}/{name}": value
        for split in ("valid", "test")
        for name, value in evaluate(model, *splits[split]).items()
    }
    save_sasrec(model, file, all_titles(catalog), metrics)
    log(f"kept epoch {best_epoch}: test {_words({k.removeprefix('test/'): v for k, v in metrics.items()})} -> {file}")
    return metrics


@torch.no_grad()
def evaluate(model: SASRec, history: Tensor, target: Tensor, batch: int = 1024) -> dict[str, float]:
    """HR and NDCG at KS of the target's rank among all item classes. history int64 [n, L], target int64 [n].

    Raises RewardError where scores are not finite.
    """
    model.eval()
    ranks = []
    for rows, wanted in zip(history.split(batch), target.split(batch), strict=True):
        scores = model(rows)
        check_finite(scores, "a score")
        ranks.append((scores > scores.gather(1, wanted[:, None])).sum(1).numpy())
    return ranking_metrics(np.concatenate(ranks), KS)


def _epoch(
    model: SASRec,
    optimizer: torch.optim.Optimizer,
    history: Tensor,
    target: Tensor,
    batch: int,
    order: torch.Generator,
) -> float:
    """One pass over the examples; the mean loss."""
    model.train()
    total = 0.0
    for rows in torch.randperm(len(target), generator=order).split(batch):
        loss = F.cross_entropy(model(history[rows]), target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(rows)
    return total / len(target)


def _split(model: SASRec, examples: Examples, split: str) -> tuple[Tensor, Tensor]:
    """(history int64 [n, L], target int64 [n])"""
    if not len(examples):
        raise RewardError(f"SASRec cannot be trained: the split {split!r} of the catalogue has no examples")
    return model.pad([examples.history_classes(i) for i in range(len(examples))]), torch.from_numpy(
        np.array(examples.target_class, np.int64)
    )


def _words(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in ("hr@1", "hr@10", "ndcg@10"))
