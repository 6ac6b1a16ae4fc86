"""What both engines do alike: requests in, groups out, weights, sleep."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from catalog.trie import Trie
from rollout.config import RolloutConfig, Strategy
from rollout.dynamic import select
from rollout.engine import EngineDied
from rollout.groups import Candidates
from rollout.vllm_arguments import EngineError
from rollout.vllm_engine import (
    call_workers,
    check_requests,
    check_strategy,
    check_temperature,
    check_vocabulary,
    has_died,
)
from rollout.vllm_internals import ENGINE_NAMES, OTHER_VLLM, check_names
from rollout.weights import WeightBucket, combine

if TYPE_CHECKING:
    from vllm import LLM


class BaseEngine(ABC):
    """A RolloutEngine over a vLLM engine whose workers are WeightsWorkers; a subclass searches."""

    def __init__(self, llm: "LLM", trie_path: str | Path, config: RolloutConfig) -> None:
        check_names(llm.llm_engine, ENGINE_NAMES, OTHER_VLLM)
        call_workers(llm, "check_internals")
        call_workers(llm, "unlink_shared_memory")
        self._llm, self._config = llm, config
        self._trie = Trie.load(Path(trie_path))
        model_config = llm.llm_engine.model_config
        self._vocab_size, self._max_model_len = model_config.get_vocab_size(), model_config.max_model_len
        check_vocabulary(trie_path, self._trie, self._vocab_size)

    @abstractmethod
    def _search(
        self, prompts: list[np.ndarray], seeds: Sequence[int], strategy: Strategy, size: int
    ) -> list[Candidates]:
        """`size` candidates of every prompt (int32 [L] each, at least one prompt), samples in the order of drawing.

        strategy: any but "dynamic", which selects among samples.
        """

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
        size = config.group_size if group_size is None else group_size
        check_strategy(strategy, size)
        check_temperature(strategy, config.temperature)
        arrays = [np.asarray(prompt, np.int32) for prompt in prompts]
        longest = config.max_completion_tokens if strategy == "unconstrained" else self._trie.max_tokens
        check_requests(arrays, seeds, strategy, longest, self._vocab_size, self._max_model_len)
        if strategy == "dynamic" and len(target_classes) != len(arrays):
            raise EngineError(
                f"{len(arrays)} prompts came with {len(target_classes)} target classes: every prompt needs one"
            )
        if not arrays:
            return []
        with self._that_may_die():
            return self._generate(arrays, seeds, target_classes, size, strategy)

    def _generate(
        self,
        arrays: list[np.ndarray],
        seeds: Sequence[int],
        target_classes: Sequence[int],
        size: int,
        strategy: Strategy,
    ) -> list[Candidates]:
        config = self._config
        if strategy == "beam":
            return self._search(arrays, seeds, strategy, size)
        if strategy == "dynamic":
            drawn = self._search(arrays, seeds, "sample", math.ceil(size * config.oversample))
            kept = [select(g.item_class, target, size) for g, target in zip(drawn, target_classes, strict=True)]
            groups = [group.take(index) for group, index in zip(drawn, kept, strict=True)]
        else:
            groups = self._search(arrays, seeds, strategy, size)
        return [group.take(np.argsort(-group.score, kind="stable")) for group in groups]

    def load_weights(self, buckets: Iterable[WeightBucket]) -> int:
        """See RolloutEngine.load_weights."""
        with self._that_may_die():
            loaded = call_workers(self._llm, "load_bucket_weights", list(buckets))
            if not self._llm.reset_prefix_cache():
                raise EngineError(
                    "vLLM keeps keys and values of the old weights, since requests still hold blocks of its cache: "
                    "load weights while nothing is generated"
                )
        return combine(loaded)

    def sleep(self) -> None:
        """See RolloutEngine.sleep."""
        with self._that_may_die():
            call_workers(self._llm, "fall_asleep")

    @contextmanager
    def _that_may_die(self) -> Iterator[None]:
        """What fails in here because a process of vLLM's has ended raises EngineDied."""
        try:
            yield
        except Exception as error:
            if has_died(self._llm):
                raise EngineDied(
                    f"a process of the rollout engine has ended ({type(error).__name__}: {error})"
                ) from error
            raise

    def shutdown(self) -> None:
        """See RolloutEngine.shutdown."""
        self._llm.llm_engine.engine_core.shutdown()
