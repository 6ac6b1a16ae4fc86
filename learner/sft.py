"""Supervised fine-tuning: raise the probability of the titles that users chose, until validation stops improving."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from catalog.atomic import CannotWrite, atomic_file
from catalog.catalog import Catalog
from learner.checkpoint import SFT_PROGRESS, writing_tensors
from learner.config import LearnerConfig, SftConfig
from learner.engine import ZeroEngine
from learner.policy import Policy
from learner.random_state import random_state, restore_random_state
from learner.schedule import learning_rate
from learner.sft_data import SupervisedExamples

REPORTS_PER_EPOCH = 20
"""At most; all ranks report at the same updates."""


@dataclass(frozen=True)
class SftProgress:
    """How far SFT has come."""

    epoch: int = 0
    """Epochs that are done."""
    best_epoch: int = 0
    best_loss: float = math.inf
    valid_loss: float = math.nan
    """Of the last epoch."""
    written_by: dict[str, Any] = field(default_factory=dict)
    """ZeroEngine.signature of the learner that has written the epochs, and can read them."""

    def after(self, valid_loss: float) -> "SftProgress":
        """One epoch later."""
        epoch, better = self.epoch + 1, valid_loss < self.best_loss
        best = (epoch, valid_loss) if better else (self.best_epoch, self.best_loss)
        return SftProgress(epoch, *best, valid_loss, self.written_by)

    def done(self, config: SftConfig) -> bool:
        """Whether the last epoch was the last of all."""
        return self.epoch >= config.epochs or self.epoch - self.best_epoch >= config.patience


class SupervisedFineTuning:
    """Epochs over the training split with early stopping; leaves the weights of the best validation loss.

    The loss is the mean negative log-probability over the title tokens of a batch, end-of-sequence included, as in
    Hugging Face's Trainer; prompt tokens carry none.

    >>> sft = SupervisedFineTuning(engine, policy, catalog, config)
    >>> for report in sft.run(folder): print(report)               # on all ranks
    """

    def __init__(self, engine: ZeroEngine, policy: Policy, catalog: Catalog, config: LearnerConfig, seed: int = 0):
        """seed: of the order of the examples."""
        self._engine, self._policy, self._config, self._seed = engine, policy, config, seed
        self._train = SupervisedExamples(catalog.examples("train"), catalog.trie)
        self._valid = SupervisedExamples(catalog.examples("valid"), catalog.trie, config.sft.valid_examples)
        self._updates_per_epoch = math.ceil(len(self._train) / config.sft.batch_size)

    def run(self, folder: Path) -> Iterator[dict[str, float]]:
        """Train; yields progress, and after each epoch a report with `valid_loss` and `stop`.

        The last epoch and the best one are kept in `folder`, which all ranks must see: with what an earlier call has
        left there, training goes on bit for bit behind its last whole epoch. The caller removes it.
        Raises FloatingPointError when no epoch ends with a finite validation loss.
        """
        sft = self._config.sft
        self._engine.restart_optimizer(sft.optimizer)
        progress = self._restored(folder)
        while not progress.done(sft):
            train_loss = 0.0
            for report in self._epoch(progress.epoch + 1):
                yield report
                train_loss = report["loss"]
            progress = progress.after(self.valid_loss())
            self._keep(folder, progress)
            yield {
                "epoch": progress.epoch,
                "loss": train_loss,
                "valid_loss": progress.valid_loss,
                "best_valid_loss": progress.best_loss,
                "stop": float(progress.done(sft)),
            }
        if not progress.best_epoch:
            raise FloatingPointError(
                f"SFT: the validation loss is {progress.valid_loss} after epoch {progress.epoch}; "
                "lower learner.sft.optimizer.learning_rate"
            )
        if progress.best_epoch != progress.epoch:
            self._engine.load(_epoch_folder(folder, progress.best_epoch))

    def _keep(self, folder: Path, progress: SftProgress) -> None:
        """Write the epoch that is done, and drop those that are neither the last nor the best."""
        path = _epoch_folder(folder, progress.epoch)
        try:
            with writing_tensors(path):
                self._engine.save(path)
                torch.save(random_state(self._engine.device), path / f"rng-{self._engine.rank}.pt")
        except CannotWrite:
            shutil.rmtree(path, ignore_errors=True)  # which may be why the disk is full
            raise
        self._engine.barrier()
        if self._engine.rank == 0:
            with atomic_file(folder / SFT_PROGRESS) as temporary:
                temporary.write_text(json.dumps(asdict(progress)))
            kept = {_epoch_folder(folder, epoch) for epoch in (progress.epoch, progress.best_epoch)}
            for old in set(folder.glob("epoch-*")) - kept:
                shutil.rmtree(old)

    def _restored(self, folder: Path) -> SftProgress:
        """The progress that `folder` tells of, with its weights and optimizer; what others have written is removed."""
        self._engine.on_rank_0(lambda: _remove_unless_written_by(self._engine.signature, folder))
        if not (folder / SFT_PROGRESS).is_file():
            return SftProgress(written_by=self._engine.signature)
        progress = _read_progress(folder)
        path = _epoch_folder(folder, progress.epoch)
        self._engine.load(path)
        restore_random_state(torch.load(path / f"rng-{self._engine.rank}.pt"), self._engine.device)
        return progress

    def valid_loss(self) -> float:
        """Mean negative log-probability per title token of the validation examples, over all ranks."""
        loss, tokens = self._no_loss(), 0.0
        self._policy.eval()  # without the dropout of adapters
        with torch.no_grad():
            for rows, weight in self._micro_batches(self._valid, np.arange(len(self._valid))):
                logp, _ = self._logprobs(self._valid, rows)
                loss -= weight * logp.sum()
                tokens += weight * self._valid.title_tokens(rows)
        self._policy.train()
        summed, tokens = self._engine.total([float(loss), tokens])
        return summed / tokens

    def _epoch(self, epoch: int) -> Iterator[dict[str, float]]:
        """One pass; the reports give the mean loss of the epoch so far on this rank."""
        start = time.perf_counter()
        every = math.ceil(self._updates_per_epoch / REPORTS_PER_EPOCH)
        loss = tokens = fed = 0.0
        batches = self._train.batches(self._config.sft.batch_size, seed=(self._seed, epoch))
        for update, batch in enumerate(batches, start=1):
            added = self._update(batch, (epoch - 1) * self._updates_per_epoch + update - 1)
            loss, tokens, fed = loss + added[0], tokens + added[1], fed + added[2]
            if update % every == 0 or update == self._updates_per_epoch:
                yield {
                    "epoch": epoch,
                    "update": update,
                    "updates": self._updates_per_epoch,
                    "loss": loss / max(tokens, 1.0),
                    "packed_tokens_per_second": fed / (time.perf_counter() - start),
                }

    def _update(self, batch: np.ndarray, step: int) -> tuple[float, float, float]:
        """One optimizer step; returns (summed loss, title tokens, packed tokens) of this rank."""
        sft = self._config.sft
        count = self._train.title_tokens(batch)
        micro_batches = self._micro_batches(self._train, batch)
        tokens = fed = 0.0
        loss = self._no_loss()
        for index, (rows, weight) in enumerate(micro_batches):
            logp, packed_tokens = self._logprobs(self._train, rows)
            summed = -weight * logp.sum()
            # The engine averages over ranks; the loss is a sum over them.
            self._engine.backward(summed * (self._engine.world_size / count), last=index == len(micro_batches) - 1)
            loss += summed.detach()
            tokens += weight * self._train.title_tokens(rows)
            fed += packed_tokens
        self._engine.step(learning_rate(sft.optimizer, step, sft.epochs * self._updates_per_epoch))
        return float(loss), tokens, fed

    def _no_loss(self) -> Tensor:
        """float64 []: what losses are added to on the device, so that no micro-batch waits for it."""
        return torch.zeros((), dtype=torch.float64, device=self._engine.device)

    def _logprobs(self, data: SupervisedExamples, rows: np.ndarray) -> tuple[Tensor, int]:
        """Log-probabilities of the title tokens, float32 [rows, T], and the tokens that were fed."""
        prompts: list[Any] = [data.prompt(row) for row in rows]
        titles: list[Any] = [[data.title(row)] for row in rows]
        packed = self._policy.pack(prompts, titles)
        return self._engine(packed), packed.fed_tokens

    def _micro_batches(self, data: SupervisedExamples, batch: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """This rank's share of a batch, with weight 1; where it has fewer than the others, a stand-in of weight 0."""
        plan = data.plan(batch, self._config.micro_batch_tokens, self._engine.world_size, self._policy.packing)
        return [(rows, 1.0) if len(rows) else (batch[:1], 0.0) for rows in plan[self._engine.rank]]


def _read_progress(folder: Path) -> SftProgress:
    return SftProgress(**json.loads((folder / SFT_PROGRESS).read_text()))


def _remove_unless_written_by(signature: dict[str, Any], folder: Path) -> None:
    """Remove the epochs of another learner: written over in place, they would be a mixture if it came back."""
    if not (folder / SFT_PROGRESS).is_file() or _read_progress(folder).written_by == signature:
        return
    (folder / SFT_PROGRESS).unlink()  # first: without it nobody reads an epoch
    for epoch in folder.glob("epoch-*"):
        shutil.rmtree(epoch)


def _epoch_folder(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch}"
