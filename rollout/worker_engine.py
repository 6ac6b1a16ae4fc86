"""The `worker` engine: the search runs inside the vLLM workers, all beams of all groups as tensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rollout.base_engine import BaseEngine
from rollout.config import RolloutConfig, Strategy
from rollout.groups import Candidates
from rollout.vllm_engine import WORKER_EXTENSION, call_workers, create_llm

CAPTURED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 2048)
"""Tokens of the passes that CUDA graphs are captured for. vLLM's own sizes end at 512 on an H200, and 64 groups feed a
thousand tokens or more in a pass: a 135M model rolls them out in 0.33 s instead of 0.40 s."""


def gpu_arguments(config: RolloutConfig) -> dict[str, Any]:
    """What vLLM is to do differently on a GPU, where nothing but its model's forward pass is wanted of it."""
    arguments: dict[str, Any] = {
        "compilation_config": {"cudagraph_mode": "PIECEWISE"},  # of what lies between attention layers
        "kernel_config": {"enable_jit_warmup": False},  # half a minute for kernels that sample tokens
    }
    if "max_cudagraph_capture_size" not in config.vllm:  # then vLLM lists the sizes itself
        arguments["cudagraph_capture_sizes"] = [size for size in CAPTURED if size <= config.max_batched_tokens]
    return arguments


class WorkerEngine(BaseEngine):
    """A RolloutEngine for constrained search and sampling at full throughput.

    >>> engine = WorkerEngine(model_path, trie_path, config)
    >>> groups = engine.generate(prompts, seeds, target_classes)
    """

    def __init__(self, model_path: str | Path, trie_path: str | Path, config: RolloutConfig) -> None:
        arguments = gpu_arguments(config) if torch.cuda.is_available() else {}
        llm = create_llm(model_path, config, worker_extension=WORKER_EXTENSION, first_runner=True, **arguments)
        super().__init__(llm, trie_path, config)
        call_workers(llm, "start_search", str(trie_path), config)

    def _search(
        self, prompts: list[np.ndarray], seeds: Sequence[int], strategy: Strategy, size: int
    ) -> list[Candidates]:
        return call_workers(self._llm, "search_groups", prompts, list(seeds), strategy, size)[0]
