"""The `requests` engine: every strategy through vLLM's public request API, one request per place where titles part."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rollout.base_engine import BaseEngine
from rollout.config import RolloutConfig, Strategy
from rollout.device_trie import DeviceTrie
from rollout.groups import Candidates
from rollout.stochastic import StochasticBeamSearch
from rollout.trie_mask import TrieRequest
from rollout.vllm_one_token import search_by_requests
from rollout.vllm_requests import BeamRequests, Draw, create_trie_llm, sample


class RequestsEngine(BaseEngine):
    """A RolloutEngine that generates through vLLM's public API alone: the oracle of the worker engine, the fallback.

    Weights, sleep and shutdown are BaseEngine's, which reach further in.

    >>> engine = RequestsEngine(model_path, trie_path, config)
    >>> groups = engine.generate(prompts, seeds, target_classes)
    """

    def __init__(self, model_path: str | Path, trie_path: str | Path, config: RolloutConfig) -> None:
        super().__init__(create_trie_llm(model_path, trie_path, config), trie_path, config)

    def _search(
        self, prompts: list[np.ndarray], seeds: Sequence[int], strategy: Strategy, size: int
    ) -> list[Candidates]:
        tokens = [prompt.tolist() for prompt in prompts]
        if strategy == "beam":
            return BeamRequests(self._llm, self._trie, tokens, size).run()
        if strategy == "stochastic_beam":
            trie, temperature, space = DeviceTrie.of(self._trie), self._config.temperature, self._config.logprob_space
            search = StochasticBeamSearch(trie, seeds, size, temperature, space)
            return search_by_requests(self._llm, self._trie, tokens, search)
        return self._sample(tokens, seeds, size, constrained=strategy == "sample")

    def _sample(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], draws: int, constrained: bool
    ) -> list[Candidates]:
        """`draws` independent samples per prompt, in the order of drawing."""
        temperature, root = self._config.temperature, 0 if constrained else None
        longest = self._trie.max_tokens if constrained else self._config.max_completion_tokens
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
