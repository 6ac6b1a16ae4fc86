"""The other opponent: beam search as vLLM's own `LLM.beam_search` does it, one request of one token per beam and step.

Prompts with what a beam has generated so far go in again at every step; the prefix cache spares most of the work. The
trie constrains every request through the project's logits processor, so that the candidates are the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catalog.trie import Trie
from rollout.config import RolloutConfig
from rollout.group_beam import GroupBeam
from rollout.groups import Candidates
from rollout.trie_mask import TrieRequest
from rollout.vllm_requests import create_trie_llm, sampling_params


class OneTokenRequests:
    """>>> groups = OneTokenRequests(model_path, trie_path, config).generate(prompts)"""

    def __init__(self, model_path: Path, trie_path: Path, config: RolloutConfig) -> None:
        self._trie, self._beams = Trie.load(trie_path), config.group_size
        self._llm = create_trie_llm(model_path, trie_path, config)

    def generate(self, prompts: Sequence[Sequence[int]]) -> list[Candidates]:
        """One group per prompt."""
        self._llm.reset_prefix_cache()
        searches = [GroupBeam(self._trie, self._beams) for _ in prompts]
        while wanted := [(group, node) for group, search in enumerate(searches) for node in search.advance()]:
            texts: list[Any] = []
            params: list[Any] = []
            for group, node in wanted:
                texts.append({"prompt_token_ids": [*prompts[group], *self._trie.path(node)]})
                fanout = int(np.diff(self._trie.first_edge[node : node + 2])[0])
                request = TrieRequest(f"group {group}", node)
                params.append(sampling_params(self._trie, request, 1, min(2 * self._beams, fanout)))
            for (group, node), output in zip(wanted, self._llm.generate(texts, params, use_tqdm=False), strict=True):
                flat: Any = output.outputs[0].logprobs
                searches[group].score(node, dict(zip(flat.token_ids, flat.logprobs, strict=True)))
        return [search.result() for search in searches]

    def shutdown(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
