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
        allowed = [trie.children(node)[0] for node in frontier.node.tolist()]
        pieces = [slice(start, start + size) for start in range(0, len(answers), size)]
        logits = (_logits(answers[piece], allowed[piece], vocabulary) for piece in pieces)
        scored = [search.children(frontier, piece, rows) for piece, rows in zip(pieces, logits, strict=True)]
        search.advance(frontier, Children.cat(scored))
    return search.results()


def _ask(
    llm: "LLM", trie: Trie, prompts: Sequence[Sequence[int]], frontier: Frontier, beams: int
) -> list[dict[int, float]]:
    """As many log-probabilities as every node of the frontier has children, by token.

    Those of all children, but that other tokens without probability may stand for a child that has none.
    """
    requests = []
    for slot, node, fanout in zip(frontier.slot, frontier.node.tolist(), frontier.fanout, strict=True):
        path = trie.path(node)
        request = TrieRequest(f"beam {slot % beams} of prompt {slot // beams} at depth {len(path)}", node)
        requests.append(([*prompts[slot // beams], *path], sampling_params(trie, request, 1, int(fanout))))
    answers: list[dict[int, float]] = [{} for _ in requests]
    for i, _, found in run_requests(llm, requests):
        answers[i] = found
    return answers


def _logits(answers: Sequence[dict[int, float]], allowed: Sequence[np.ndarray], vocabulary: int) -> torch.Tensor:
    """Logits [R, V] with these log-probabilities: what the children leave of probability 1 lies on one other token.

    answers: of `_ask`. allowed: the tokens of each node's children, ascending.
    """
    logits = torch.full((len(answers), vocabulary), -torch.inf)
    for row, answer, children in zip(logits, answers, allowed, strict=True):
        tokens, logprobs = np.array(list(answer)), np.array(list(answer.values()))
        row[torch.from_numpy(tokens)] = torch.from_numpy(logprobs).float()
        rest = 1.0 - np.exp(logprobs).sum()
        other = int(np.append(children != np.arange(len(children)), True).argmax())  # the lowest that is no child
        if rest > 0 and other < vocabulary:
            row[other] = float(np.log(rest))
    return logits
