"""The `worker` engine: the search runs inside the vLLM workers, all beams of all groups as tensors."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from catalog.trie import Trie
from rollout.config import RolloutConfig, Strategy
from rollout.dynamic import select
from rollout.groups import Candidates
from rollout.vllm_engine import check_requests, check_temperature, check_vocabulary, create_llm
from rollout.weights import WeightBucket, combine

WORKER_EXTENSION = "rollout.vllm_worker.SearchWorker"


class WorkerEngine:
    """A RolloutEngine for constrained search and sampling at full throughput.

    >>> engine = WorkerEngine(model_path, trie_path, config)
    >>> groups = engine.generate(prompts, seeds, target_classes)
    """

    def __init__(self, model_path: str | Path, trie_path: str | Path, config: RolloutConfig) -> None:
        self._config = config
        self._llm = create_llm(
            model_path,
            config,
            worker_extension=WORKER_EXTENSION,
            first_runner=True,
            whole_graphs=False,
        )
        trie = Trie.load(Path(trie_path))
        model_config = self._llm.llm_engine.model_config
        self._vocab_size, self._max_model_len = model_config.get_vocab_size(), model_config.max_model_len
        self._title_tokens = trie.max_tokens
        check_vocabulary(trie_path, trie, self._vocab_size)
        self._llm.collective_rpc("start_search", args=(str(trie_path), config))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        target_classes: Sequence[int],
        *,
        group_size: int | None = None,
        strategy: Strategy | None = None,
    ) -> list[Candidates]:
        """See RolloutEngine.generate. Samples are ordered by their log-probability."""
        config, strategy = self._config, strategy or self._config.strategy
        size = group_size or config.group_size
        check_temperature(strategy, config.temperature)
        arrays = [np.asarray(prompt, np.int32) for prompt in prompts]
        longest = config.max_completion_tokens if strategy == "unconstrained" else self._title_tokens
        check_requests(arrays, seeds, longest, self._vocab_size, self._max_model_len)
        if not arrays:
            return []
        if strategy == "beam":
            return self._search(arrays, seeds, strategy, size)
        draws = math.ceil(size * config.oversample) if strategy == "dynamic" else size
        groups = self._search(arrays, seeds, "sample" if strategy == "dynamic" else strategy, draws)
        if strategy == "dynamic":
            groups = [g.take(select(g.item_class, t, size)) for g, t in zip(groups, target_classes, strict=True)]
        return [group.take(np.argsort(-group.score, kind="stable")) for group in groups]

    def _search(
        self, prompts: list[np.ndarray], seeds: Sequence[int], strategy: Strategy, size: int
    ) -> list[Candidates]:
        return self._llm.collective_rpc("search_groups", args=(prompts, list(seeds), strategy, size))[0]

    def load_weights(self, buckets: Iterable[WeightBucket]) -> int:
        """See RolloutEngine.load_weights."""
        loaded = self._llm.collective_rpc("load_bucket_weights", args=(list(buckets),))
        self._llm.reset_prefix_cache()
        return combine(loaded)

    def sleep(self) -> None:
        """See RolloutEngine.sleep."""
        self._llm.collective_rpc("fall_asleep")

    def shutdown(self) -> None:
        """See RolloutEngine.shutdown."""
        self._llm.llm_engine.engine_core.shutdown()
