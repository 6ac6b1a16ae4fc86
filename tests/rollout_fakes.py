"""A rollout engine without a model, for tests of the actor, the streams and the fleet."""

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from catalog.trie import Trie
from rollout.config import RolloutConfig, Strategy
from rollout.engine import EngineDied
from rollout.groups import Candidates
from rollout.weights import WeightBucket, checksum


class FakeEngine:
    """Candidates drawn from the seed alone; a file next to the model makes it slow, or die once.

    `<model>/die_at` holds the number of the call at which the process ends, 0 for the start of the engine; it is
    removed first, so that the restarted worker lives, unless it says "always". `<model>/lost` does as if a process of
    the engine had ended, likewise once. `<model>/start` holds the seconds that the engine takes to start,
    `<model>/sleep` those that a call takes. Calls are counted in `<model>/calls`; at its shutdown it leaves
    `<model>/ended`.
    """

    def __init__(self, model_path: str, trie_path: Path, config: RolloutConfig) -> None:
        self.model_path, self.config, self.calls = Path(model_path), config, 0
        self.trie = Trie.load(trie_path)
        self._sleep_if_asked("start")
        self._die_if_asked()

    def _die_if_asked(self) -> None:
        die_at = self.model_path / "die_at"
        if die_at.exists() and die_at.read_text() == "always":
            os._exit(1)
        if die_at.exists() and int(die_at.read_text()) == self.calls:
            die_at.unlink()
            os._exit(1)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        target_classes: Sequence[int],
        *,
        group_size: int | None = None,
        strategy: Strategy | None = None,
    ) -> list[Candidates]:
        self.calls += 1
        (self.model_path / "calls").write_text(str(self.calls))
        self._die_if_asked()
        self._lose_a_process_if_asked()
        self._sleep_if_asked("sleep")
        return [self._group(seed, group_size or self.config.group_size) for seed in seeds]

    def _sleep_if_asked(self, file: str) -> None:
        if (self.model_path / file).exists():
            time.sleep(float((self.model_path / file).read_text()))

    def _lose_a_process_if_asked(self) -> None:
        if (self.model_path / "lost").exists():
            (self.model_path / "lost").unlink()
            raise EngineDied("a process of the rollout engine has ended")

    def _group(self, seed: int, size: int) -> Candidates:
        classes = np.random.default_rng(seed).permutation(self.trie.num_classes)[:size].astype(np.int32)
        tokens = [np.asarray(self.trie.title_tokens(int(item)), np.int32) for item in classes]
        logprobs = [np.full(len(title), -0.5, np.float32) for title in tokens]
        score = np.asarray([row.sum() for row in logprobs], np.float32)
        return Candidates(tokens=tokens, logprobs=logprobs, item_class=classes, score=score)

    def load_weights(self, buckets: Iterable[WeightBucket]) -> int:
        self._lose_a_process_if_asked()
        return checksum(named for bucket in buckets for named in bucket.tensors())

    def sleep(self) -> None:
        pass

    def shutdown(self) -> None:
        (self.model_path / "ended").touch()
