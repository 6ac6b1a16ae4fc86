"""The `requests` engine: every strategy through vLLM's public request API, one request per place where titles part."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from catalog.trie import Trie
from rollout.children import DeviceTrie
from rollout.config import RolloutConfig, Strategy
from rollout.dynamic import select
from rollout.groups import Candidates
from rollout.stochastic import StochasticBeamSearch
from rollout.trie_mask import TrieRequest
from rollout.vllm_engine import check_requests, check_temperature, check_vocabulary
from rollout.vllm_one_token import search_by_requests
from rollout.vllm_requests import BeamRequests, Draw, create_trie_llm, sample
from rollout.weights import WeightBucket, combine


class RequestsEngine:
    """A RolloutEngine that touches nothing but vLLM's public API: the oracle of the worker engine, and the fallback.

    >>> engine = RequestsEngine(model_path, trie_path, config)
    >>> groups = engine.generate(prompts, seeds, target_classes)
    """

    def __init__(self, model_path: str | Path, trie_path: str | Path, config: RolloutConfig) -> None:
        self._config = config
        self._trie = Trie.load(Path(trie_path))
        self._llm = create_trie_llm(model_path, trie_path, config)
        model_config = self._llm.llm_engine.model_config
        self._vocab_size, self._max_model_len = model_config.get_vocab_size(), model_config.max_model_len
        check_vocabulary(trie_path, self._trie, self._vocab_size)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        target_classes: Sequence[int],
        *,
        group_size: int | None = None,
        strategy: Strategy | None = None,
    ) -> list[Candidates]:
        """See RolloutEngine.generate. Candidates of the sampling strategies are ordered by their log-probability."""
        strategy, size = strategy or self._config.strategy, group_size or self._config.group_size
        check_temperature(strategy, self._config.temperature)
        constrained = strategy != "unconstrained"
        longest = self._trie.max_tokens if constrained else self._config.max_completion_tokens
        arrays = [np.asarray(prompt, np.int64) for prompt in prompts]
        check_requests(arrays, seeds, longest, self._vocab_size, self._max_model_len)
        tokens = [array.tolist() for array in arrays]
        if strategy == "beam":
            return BeamRequests(self._llm, self._trie, tokens, size).run()
        if strategy == "stochastic_beam":
            config = self._config
            search = StochasticBeamSearch(
                DeviceTrie.of(self._trie), seeds, size, config.temperature, config.logprob_space
            )
            groups = search_by_requests(self._llm, self._trie, tokens, search) if tokens else []
        else:
            draws = math.ceil(size * self._config.oversample) if strategy == "dynamic" else size
            groups = self._sample(tokens, seeds, draws, longest, constrained)
        if strategy == "dynamic":
            chosen = [select(g.item_class, target, size) for g, target in zip(groups, target_classes, strict=True)]
            groups = [group.take(index) for group, index in zip(groups, chosen, strict=True)]
        return [group.take(np.argsort(-group.score, kind="stable")) for group in groups]

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

    def _sample(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], draws: int, longest: int, constrained: bool
    ) -> list[Candidates]:
        """`draws` independent samples per prompt, in the order of drawing."""
        temperature = self._config.temperature
        root = 0 if constrained else None
        planned = [
            Draw(prompt, TrieRequest(f"{i} of prompt {group}", root, temperature, seeds[group], i), longest)
            for group, prompt in enumerate(prompts)
            for i in range(draws)
        ]
        found = sample(self._llm, self._trie, planned)
        return [self._candidates(found[i : i + draws]) for i in range(0, len(found), draws)]

    def _candidates(self, found: Sequence[tuple[np.ndarray, np.ndarray]]) -> Candidates:
        return Candidates(
            tokens=[tokens for tokens, _ in found],
            logprobs=[logprobs for _, logprobs in found],
            item_class=np.asarray([self._trie.classify(tokens.tolist()) for tokens, _ in found], np.int32),
            score=np.asarray([logprobs.sum() for _, logprobs in found], np.float32),
        )
