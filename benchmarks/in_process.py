"""Rollout engine and learner in this process, without actors: for profiles, counts and shapes of any kind."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.arithmetic import Work
from benchmarks.harness import threads, timed
from catalog.catalog import Catalog
from launch.config import Config
from learner.engine import join_process_group
from learner.learner import Learner
from learner.packing import PackedBatch
from rollout.engines import create_engine
from rollout.groups import Candidates, group_table
from rollout.vllm_internals import PagedModel, TokenBatch


class InProcess:
    """One training step as three calls.

    >>> step = InProcess(config, model_path, catalog)
    >>> groups = step.rollout(prompts)
    >>> metrics = step.learn(prompts, groups)
    >>> seconds = step.sync()
    """

    def __init__(self, config: Config, model_path: Path, catalog: Catalog, trie_path: Path | None = None) -> None:
        """trie_path: search another trie than the catalogue's."""
        torch.set_num_threads(threads())
        self.engine = create_engine(str(model_path), trie_path or catalog.path / "trie.arrow", config.rollout)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        device = join_process_group(0, 1, "127.0.0.1", port, config.learner.timeout_s)
        self.learner = Learner(str(model_path), catalog, config.learner, config.rollout.logprob_space, 1000, 0, device)

    def rollout(self, prompts: Sequence[Sequence[int]], group_size: int | None = None) -> list[Candidates]:
        """One group per prompt."""
        none = [0] * len(prompts)
        return self.engine.generate(prompts, none, none, group_size=group_size)

    def learn(self, prompts: Sequence[Sequence[int]], groups: Sequence[Candidates]) -> dict[str, float]:
        """One optimizer step; the first candidate of every group counts as the hit, so that all groups are learned."""
        table = group_table(range(len(prompts)), 0, prompts, [int(group.item_class[0]) for group in groups], groups)
        rewards = [np.eye(1, len(group.score), dtype=np.float32)[0] for group in groups]
        column = pa.array(rewards, pa.list_(pa.float32()))
        return self.learner.step([table.append_column("reward", column)])

    def packed(self, prompts: Sequence[Sequence[int]], groups: Sequence[Candidates]) -> list[PackedBatch]:
        """The learner's batch of each group."""
        pack = self.learner.policy.pack
        return [
            pack([prompt], [[tokens.tolist() for tokens in group.tokens]])
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def sync(self) -> float:
        """Seconds from the learner's weights to the engine's."""
        return timed(lambda: self.engine.load_weights(list(self.learner.export_weights())))


@dataclass
class ForwardWork(Work):
    """What the rollout engine fed to its model, and how long that took."""

    passes: int = 0
    forward_s: float = 0.0
    logits_s: float = 0.0


@contextmanager
def counted_forwards() -> Iterator[ForwardWork]:
    """Count and time the forward passes of worker engines of this process."""
    work = ForwardWork()
    forward, logits = PagedModel.forward, PagedModel.logits

    def counting_forward(self: PagedModel, batch: TokenBatch) -> torch.Tensor:
        result: list[torch.Tensor] = []
        work.forward_s += timed(lambda: result.append(forward(self, batch)))
        work.passes += 1
        work.tokens += len(batch.position)
        work.attended += int(batch.position.sum()) + len(batch.position)
        work.attended_by_rows += int(batch.position[batch.wanted].sum()) + len(batch.wanted)
        return result[0]

    def counting_logits(self: PagedModel, hidden: torch.Tensor) -> torch.Tensor:
        result: list[torch.Tensor] = []
        work.logits_s += timed(lambda: result.append(logits(self, hidden)))
        work.logit_rows += len(hidden)
        return result[0]

    PagedModel.forward, PagedModel.logits = counting_forward, counting_logits  # type: ignore[method-assign]
    try:
        yield work
    finally:
        PagedModel.forward, PagedModel.logits = forward, logits  # type: ignore[method-assign]
