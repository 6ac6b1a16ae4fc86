"""Searches and samples through vLLM's public request API: no access to its internals."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from catalog.trie import Trie
from rollout.config import RolloutConfig
from rollout.finite import LogitsError
from rollout.group_beam import GroupBeam
from rollout.groups import Candidates
from rollout.trie_mask import TrieRequest
from rollout.vllm_engine import WORKER_EXTENSION, create_llm

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


def create_trie_llm(model_path: str | Path, trie_path: str | Path, config: RolloutConfig) -> "LLM":
    """An engine whose requests walk the trie and whose log-probabilities are those that the trie mask writes.

    Uses Model Runner V1 unless VLLM_USE_V2_MODEL_RUNNER=1 is set.
    """
    second_runner = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") == "1"
    processor = "vllm_trie_v2:TrieLogitsProcessorV2" if second_runner else "vllm_trie_v1:TrieLogitsProcessor"
    return create_llm(
        model_path,
        config,
        worker_extension=WORKER_EXTENSION,
        logits_processors=[f"rollout.{processor}"],
        first_runner=not second_runner,
        logprobs_mode="processed_logits",
        max_logprobs=-1,
        disable_log_stats=True,
        additional_config={"trie_path": str(trie_path), "logprob_space": config.logprob_space},
    )


@dataclass
class _Walk:
    """A running request: it scores one node of the trie per step, following the most likely child."""

    name: str
    group: int
    first_depth: int
    nodes: list[int]
    """Those it has scored and, last, the one it scores next."""

    def node_at(self, depth: int) -> int | None:
        """None below what it has reached. Searches wait for the walks of their beams, so no beam can stand there."""
        index = depth - self.first_depth
        return self.nodes[index] if index < len(self.nodes) else None


class BeamRequests:
    """Beam search of many groups: a request per place where beams part, all groups moving independently.

    A request starts at a node that a search needs and follows the most likely child to the end of a title, scoring
    every node on the way; so one request serves a beam for as long as that beam takes the likeliest turns, all along
    the forced chains that most of a title is. It is aborted as soon as no running beam stands on its way.
    """

    def __init__(self, llm: "LLM", trie: Trie, prompts: Sequence[Sequence[int]], beams: int) -> None:
        self._engine = llm.llm_engine
        self._trie, self._prompts, self._beams = trie, prompts, beams
        self._searches = [GroupBeam(trie, beams) for _ in prompts]
        self._walks: dict[str, _Walk] = {}
        self._walks_of: list[dict[str, _Walk]] = [{} for _ in prompts]
        self._started = 0
        self._widest = widest_fanout_below(trie)

    def run(self) -> list[Candidates]:
        try:
            for group in range(len(self._prompts)):
                self._go_on(group)
            while self._walks:
                for group in self._step():
                    self._go_on(group)
        finally:
            self._engine.abort_request(list(self._walks))
        return [search.result() for search in self._searches]

    def _step(self) -> list[int]:
        """One step of vLLM; the groups that have news, in order."""
        touched = set()
        for output in self._engine.step():
            walk = self._walks.get(output.request_id)
            if walk is None:
                continue  # an aborted request's last step was under way already
            for token, logprobs in _steps(output):
                self._searches[walk.group].score(walk.nodes[-1], logprobs)
                target = self._trie.step(walk.nodes[-1], token)
                assert target is not None  # the logits processor raises before
                if target >= 0:
                    walk.nodes.append(target)
            if output.finished:
                self._forget(walk)
            touched.add(walk.group)
        return sorted(touched)

    def _go_on(self, group: int) -> None:
        """Advance a search; abort what serves it no more and ask for what it lacks."""
        search = self._searches[group]
        missing = search.advance()
        running = search.running_nodes()
        useless = [walk for walk in self._walks_of[group].values() if walk.node_at(search.depth) not in running]
        for walk in useless:
            self._forget(walk)
        if useless:
            self._engine.abort_request([walk.name for walk in useless])
        under_way = {walk.nodes[-1] for walk in self._walks_of[group].values()}
        for node in missing:
            if node not in under_way:
                self._start(group, node)

    def _start(self, group: int, node: int) -> None:
        path = self._trie.path(node)
        walk = _Walk(f"{group}-{self._started}", group, len(path), [node])
        self._started += 1
        self._walks[walk.name] = walk
        self._walks_of[group][walk.name] = walk
        request = TrieRequest(f"{walk.name} at depth {len(path)}", node)
        needed = min(2 * self._beams, int(self._widest[node]))  # each one costs the host time at every step
        params = sampling_params(self._trie, request, self._trie.max_tokens - len(path), needed)
        self._engine.add_request(walk.name, {"prompt_token_ids": [*self._prompts[group], *path]}, params)

    def _forget(self, walk: _Walk) -> None:
        del self._walks[walk.name]
        del self._walks_of[walk.group][walk.name]


def widest_fanout_below(trie: Trie) -> np.ndarray:
    """int64 [N]: the most children of any node from each node on."""
    widest = np.diff(trie.first_edge)
    starts = trie.level_start.tolist()
    for start, stop in zip(starts[-2::-1], starts[:0:-1], strict=True):
        edges = slice(int(trie.first_edge[start]), int(trie.first_edge[stop]))
        of_child = np.where(trie.edge_target[edges] >= 0, widest[np.maximum(trie.edge_target[edges], 0)], 0)
        below = np.maximum.reduceat(of_child, trie.first_edge[start:stop] - edges.start)
        widest[start:stop] = np.maximum(widest[start:stop], below)
    return widest


@dataclass(frozen=True)
class Draw:
    """One sample to take: independent of all others."""

    prompt: Sequence[int]
    request: TrieRequest
    max_tokens: int


def sample(llm: "LLM", trie: Trie, draws: Sequence[Draw]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens int32 [T], log-probabilities float32 [T]) of each draw.

    The log-probabilities are those of the policy, at temperature 1, as the trie mask defines them.
    """
    requests = [(draw.prompt, sampling_params(trie, draw.request, draw.max_tokens)) for draw in draws]
    tokens: list[list[int]] = [[] for _ in draws]
    logprobs: list[list[float]] = [[] for _ in draws]
    for i, token, found in run_requests(llm, requests):
        tokens[i].append(token)
        logprobs[i].append(found[token])
    return [
        (np.asarray(ids, np.int32), np.asarray(own, np.float32)) for ids, own in zip(tokens, logprobs, strict=True)
    ]


def run_requests(
    llm: "LLM", requests: Sequence[tuple[Sequence[int], "SamplingParams"]]
) -> Iterator[tuple[int, int, dict[int, float]]]:
    """(which request, token, log-probability by token) of every token that any of them generates, as they come.

    None is left in the engine where one of them is refused or the caller stops: its answers would be taken for others.
    """
    engine = llm.llm_engine
    try:
        for i, (prompt, params) in enumerate(requests):
            engine.add_request(str(i), {"prompt_token_ids": list(prompt)}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                for token, found in _steps(output):
                    yield int(output.request_id), token, found
    finally:
        if engine.has_unfinished_requests():
            engine.abort_request([str(i) for i in range(len(requests))])


def sampling_params(trie: Trie, request: TrieRequest, max_tokens: int, logprobs: int = 0) -> "SamplingParams":
    """Always greedy: samples are drawn in the trie mask, so nothing of vLLM's sampler or the model's defaults matters.

    logprobs: log-probabilities to return per token, besides its own.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,  # the ends of the model's defaults, which may be tokens of a title
        stop_token_ids=[trie.eos_token],
        logprobs=logprobs,
        flat_logprobs=True,
        detokenize=False,
        skip_clone=True,
        output_kind=RequestOutputKind.DELTA,
        extra_args=request.extra_args(),
    )


def _steps(output: Any) -> Iterator[tuple[int, dict[int, float]]]:
    """(token, log-probability by token) of every token that a request has generated since its last output.

    Raises LogitsError where a token without probability was the likeliest, or the model's logits are not finite.
    """
    completion = output.outputs[0]
    flat = completion.logprobs
    for token, start, end in zip(completion.token_ids, flat.start_indices, flat.end_indices, strict=True):
        found = dict(zip(flat.token_ids[start:end], flat.logprobs[start:end], strict=True))
        if not math.isfinite(found[token]):
            raise LogitsError
        yield token, found
