"""The `worker` engine: the search runs inside the vLLM workers, all beams of all groups as tensors."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from rollout.config import RolloutConfig, Strategy
from rollout.groups import Candidates
from rollout.vllm_engine import EngineError, create_llm
from rollout.weights import WeightBucket, combine

WORKER_EXTENSION = "rollout.vllm_worker.SearchWorker"


class WorkerEngine:
    """A RolloutEngine for constrained beam search at full throughput.

    >>> engine = WorkerEngine(model_path, trie_path, config)
    >>> groups = engine.generate(prompts, seeds, target_classes)
    """

    def __init__(self, model_path: str | Path, trie_path: str | Path, config: RolloutConfig) -> None:
        self._config = config
        self._llm = create_llm(model_path, config, worker_extension=WORKER_EXTENSION, first_runner=True)
        self._llm.collective_rpc("start_search", args=(str(trie_path), config.logprob_space))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        target_classes: Sequence[int],
        *,
        group_size: int | None = None,
        strategy: Strategy | None = None,
    ) -> list[Candidates]:
        """See RolloutEngine.generate."""
        strategy = strategy or self._config.strategy
        if strategy != "beam":
            raise EngineError(f"the worker engine has no strategy {strategy!r}; use rollout.engine=requests")
        arrays = [np.asarray(prompt, np.int32) for prompt in prompts]
        for i, prompt in enumerate(arrays):
            if not len(prompt):
                raise EngineError(f"prompt {i} has no tokens")
        if not arrays:
            return []
        return self._llm.collective_rpc("search_groups", args=(arrays, group_size or self._config.group_size))[0]

    def load_weights(self, buckets: Iterable[WeightBucket]) -> int:
        """See RolloutEngine.load_weights."""
        loaded = self._llm.collective_rpc("load_bucket_weights", args=(list(buckets),))
        self._llm.reset_prefix_cache()
        return combine(loaded)

    def shutdown(self) -> None:
        """See RolloutEngine.shutdown."""
        self._llm.llm_engine.engine_core.shutdown()
