"""The `worker` engine: the search runs inside the vLLM workers, all beams of all groups as tensors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rollout.base_engine import BaseEngine
from rollout.config import RolloutConfig, Strategy
from rollout.groups import Candidates
from rollout.vllm_engine import WORKER_EXTENSION, call_workers, create_llm


class WorkerEngine(BaseEngine):
    """A RolloutEngine for constrained search and sampling at full throughput.

    >>> engine = WorkerEngine(model_path, trie_path, config)
    >>> groups = engine.generate(prompts, seeds, target_classes)
    """

    def __init__(self, model_path: str | Path, trie_path: str | Path, config: RolloutConfig) -> None:
        llm = create_llm(model_path, config, worker_extension=WORKER_EXTENSION, first_runner=True, whole_graphs=False)
        super().__init__(llm, trie_path, config)
        call_workers(llm, "start_search", str(trie_path), config)

    def _search(
        self, prompts: list[np.ndarray], seeds: Sequence[int], strategy: Strategy, size: int
    ) -> list[Candidates]:
        return call_workers(self._llm, "search_groups", prompts, list(seeds), strategy, size)[0]
