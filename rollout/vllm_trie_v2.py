"""The trie mask as a logits processor of vLLM's Model Runner V2: all walking happens on the device."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

from catalog.trie import Trie
from rollout.device_trie import DeviceTrie
from rollout.trie_mask import LEFT, LeftTrie, Sampling, TrieMask, TrieRequest


class TrieLogitsProcessorV2(LogitsProcessor):
    """Constrains every request to the trie in additional_config["trie_path"], starting at its own node.

    The node of each request slot lives on the device; the host only counts how many output tokens each slot has
    walked, which without speculative decoding it knows exactly. A step waits for the device twice: to learn whether a
    row has left the trie, and how many tokens are allowed.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        TrieRequest.of(sampling_params.extra_args)

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("the trie mask walks one token at a time: speculative decoding must be off")
        settings: Any = vllm_config.additional_config
        trie = Trie.load(Path(settings["trie_path"]))
        device = req_states.device
        self._mask = TrieMask(DeviceTrie.of(trie, device), settings["logprob_space"])
        self._states = req_states
        self._requests: dict[int, TrieRequest] = {}
        self._constrained = np.zeros(req_states.max_num_reqs, bool)
        self._free = np.zeros(req_states.max_num_reqs, bool)
        self._walked = np.zeros(req_states.max_num_reqs, np.int64)
        self._nodes = torch.zeros(req_states.max_num_reqs, dtype=torch.int64, device=device)
        self._staged: dict[int, int] = {}
        self._warming_up = True
        """Until the first caller's request: vLLM's own, which warm its kernels up, know of no trie."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        if self._warming_up and not sampling_params.extra_args:
            request = TrieRequest("warm-up", None)
        else:
            self._warming_up, request = False, TrieRequest.of(sampling_params.extra_args)
        self._requests[req_idx] = request
        self._constrained[req_idx], self._free[req_idx] = request.node is not None, request.node is None
        self._walked[req_idx] = 0  # also after a preemption, which brings the tokens generated before it
        self._staged[req_idx] = LEFT if request.node is None else request.node
        return True

    def apply_staged_writes(self) -> None:
        if self._staged:
            slots, nodes = zip(*self._staged.items(), strict=True)
            self._nodes[self._on_device(slots)] = self._on_device(nodes)
            self._staged.clear()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        slots = ctx.idx_mapping_np
        if len(logits) != len(slots):
            raise ValueError(f"{len(logits)} rows of logits for {len(slots)} requests: expected one row per request")
        outputs = ctx.seq_lens_upper_bound_np.astype(np.int64) - self._states.prompt_len.np[slots]
        rows = np.flatnonzero(self._constrained[slots])
        if len(rows):
            self._advance(slots[rows], outputs[rows])
            nodes = self._nodes[self._on_device(slots[rows])]
            self._check(nodes, slots[rows])
            sampling = self._sampling(slots[rows], outputs[rows])
            self._mask.constrain_(logits, self._on_device(rows), nodes, sampling)
        free = np.flatnonzero(self._free[slots])
        if len(free):
            self._mask.normalise_(logits, self._on_device(free), self._sampling(slots[free], outputs[free]))
        return logits

    def _sampling(self, slots: np.ndarray, outputs: np.ndarray) -> Sampling | None:
        requests = [self._requests[slot] for slot in slots.tolist()]
        return Sampling.of(requests, outputs.tolist(), self._nodes.device)

    def _advance(self, slots: np.ndarray, outputs: np.ndarray) -> None:
        """Walk slots that have generated `outputs` tokens by now: one step each, more after a preemption.

        A prompt that is still being read in chunks has no output yet, and its row is thrown away by the sampler.
        """
        prompt = self._states.prompt_len.np[slots].astype(np.int64)
        tokens = self._states.all_token_ids.gpu
        while (behind := self._walked[slots] < outputs).any():
            late = slots[behind]
            on_device = self._on_device(late)
            position = self._on_device(prompt[behind] + self._walked[late])
            self._nodes[on_device] = self._mask.step(self._nodes[on_device], tokens[on_device, position].long())
            self._walked[late] += 1

    def _check(self, nodes: torch.Tensor, slots: np.ndarray) -> None:
        left = (nodes == LEFT).nonzero().flatten().tolist()
        if left:
            slot = int(slots[left[0]])
            depth = int(self._walked[slot]) - 1
            prompt = int(self._states.prompt_len.np[slot])
            token = int(self._states.all_token_ids.gpu[slot, prompt + depth])
            raise LeftTrie(self._requests[slot].label, token, depth)

    def _on_device(self, values: np.ndarray | tuple[int, ...]) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, np.int64)).to(self._nodes.device, non_blocking=True)
