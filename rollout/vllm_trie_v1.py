"""The trie mask as a logits processor of vLLM's first model runner."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from catalog.trie import Trie
from rollout.device_trie import DeviceTrie
from rollout.trie_mask import LEFT, LeftTrie, Sampling, TrieMask, TrieRequest


@dataclass
class _Row:
    """A request in the batch: where it stands, and how many of its output tokens led there."""

    request: TrieRequest
    output: list[int]
    """vLLM's own list, which grows as the request runs."""
    node: int
    walked: int = 0


class TrieLogitsProcessor(LogitsProcessor):
    """Constrains every request to the trie in additional_config["trie_path"], starting at its own node.

    Loaded with logits_processors=["rollout.vllm_trie_v1:TrieLogitsProcessor"]; with logprobs_mode="processed_logits"
    the values that vLLM returns are the log-probabilities which the mask writes.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        TrieRequest.of(sampling_params.extra_args)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        settings: Any = vllm_config.additional_config
        trie = Trie.load(Path(settings["trie_path"]))
        space = settings["logprob_space"]
        self._walk = TrieMask(DeviceTrie.of(trie, "cpu"), space)
        on_host = torch.device(device).type == "cpu"
        self._mask = self._walk if on_host else TrieMask(DeviceTrie.of(trie, device), space)
        self._device = device
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch: removed, added, moved, in this order (the interface's)."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, output in batch_update.added:
            request = TrieRequest.of(params.extra_args)
            self._rows[index] = _Row(request, output, LEFT if request.node is None else request.node)
        for source, destination, direction in batch_update.moved:
            moved, displaced = self._rows.pop(source, None), self._rows.pop(destination, None)
            if moved is not None:
                self._rows[destination] = moved
            if direction == MoveDirectionality.SWAP and displaced is not None:
                self._rows[source] = displaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Walk here and not in update_state: with asynchronous scheduling the last tokens are known only now."""
        self._advance()
        constrained = [index for index, row in self._rows.items() if row.request.node is not None]
        free = [index for index, row in self._rows.items() if row.request.node is None]
        if constrained:
            nodes = self._to_device([self._rows[index].node for index in constrained])
            self._mask.constrain_(logits, self._to_device(constrained), nodes, self._sampling(constrained))
        if free:
            self._mask.normalise_(logits, self._to_device(free), self._sampling(free))
        return logits

    def _sampling(self, indices: list[int]) -> Sampling | None:
        rows = [self._rows[index] for index in indices]
        return Sampling.of([row.request for row in rows], [len(row.output) for row in rows], self._device)

    def _to_device(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values).to(self._device, non_blocking=True)

    def _advance(self) -> None:
        """Walk every row along the tokens that it has generated since the last call: one for most rows."""
        while rows := [r for r in self._rows.values() if r.request.node is not None and r.walked < len(r.output)]:
            tokens = [row.output[row.walked] for row in rows]
            nodes = self._walk.step(torch.tensor([row.node for row in rows]), torch.tensor(tokens)).tolist()
            for row, node, token in zip(rows, nodes, tokens, strict=True):
                if node == LEFT:
                    raise LeftTrie(row.request.label, token, row.walked)
                row.node = node
                row.walked += 1
