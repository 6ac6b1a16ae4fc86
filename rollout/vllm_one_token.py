"""Drives any search over the trie through vLLM's public requests: one request of one token per place to score."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from catalog.trie import Trie
from rollout.children import Children
from rollout.frontier import Frontier, TrieSearch
from rollout.groups import Candidates
from rollout.trie_mask import TrieRequest
from rollout.vllm_requests import run_requests, sampling_params

if TYPE_CHECKING:
    from vllm import LLM

_LOGITS_ELEMENTS = 1 << 24
"""Numbers of one piece of the logits that are put together from the answers."""
_IMPOSSIBLE = -1e30
"""The logit of a token without probability; finite, as logits are."""


def search_by_requests(
    llm: "LLM", trie: Trie, prompts: Sequence[Sequence[int]], search: TrieSearch
) -> list[Candidates]:
    """The groups of a search that scores one node per beam and step; prefix caching spares most of the work.

    `llm` must come from create_trie_llm.
    """
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    size = max(1, _LOGITS_ELEMENTS // vocabulary)
    while (frontier := search.frontier()).size:
        answers = _ask(llm, trie, prompts, frontier, search.beams)
        pieces = [slice(start, start + size) for start in range(0, len(answers), size)]
        scored = [search.children(frontier, piece, _logits(answers[piece], vocabulary)) for piece in pieces]
        search.advance(frontier, Children.cat(scored))
    return search.results()


def _ask(
    llm: "LLM", trie: Trie, prompts: Sequence[Sequence[int]], frontier: Frontier, beams: int
) -> list[dict[int, float]]:
    """Log-probabilities of all children of every node of the frontier, by token."""
    requests = []
    for slot, node, fanout in zip(frontier.slot, frontier.node.tolist(), frontier.fanout, strict=True):
        path = trie.path(node)
        request = TrieRequest(f"beam {slot % beams} of prompt {slot // beams} at depth {len(path)}", node)
        requests.append(([*prompts[slot // beams], *path], sampling_params(trie, request, 1, int(fanout))))
    answers: list[dict[int, float]] = [{} for _ in requests]
    for i, _, found in run_requests(llm, requests):
        answers[i] = found
    return answers


def _logits(answers: Sequence[dict[int, float]], vocabulary: int) -> torch.Tensor:
    """Logits [R, V] with these log-probabilities: what the children leave of probability 1 lies on one other token."""
    logits = torch.full((len(answers), vocabulary), _IMPOSSIBLE)
    for row, answer in zip(logits, answers, strict=True):
        tokens, logprobs = np.array(list(answer)), np.array(list(answer.values()))
        row[torch.from_numpy(tokens)] = torch.from_numpy(logprobs).float()
        rest = 1.0 - np.exp(logprobs).sum()
        other = next((token for token in range(len(answer) + 1) if token not in answer), vocabulary)
        if rest > 0 and other < vocabulary:
            row[other] = float(np.log(rest))
    return logits
