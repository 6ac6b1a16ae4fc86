"""The trie as a mask over logits: the core of the logits processors, free of vLLM.

A row of logits stands at a node of the trie. `step` moves it along a generated token, `constrain_` turns its logits
into the log-probabilities of the tokens that the trie allows there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rollout.config import LogprobSpace
from rollout.children import DeviceTrie

ENDED = -1
"""Node of a row whose title has ended."""
LEFT = -2
"""Node of a row that generated a token which the trie does not allow."""
_ROWS_PER_CHUNK = 128


class LeftTrie(RuntimeError):
    """A generated token is not allowed by the trie: the mask did not reach the sampler."""

    def __init__(self, request: str, token: int, depth: int) -> None:
        super().__init__(request, token, depth)
        self.request, self.token, self.depth = request, token, depth

    def __str__(self) -> str:
        return (
            f"request {self.request}: token {self.token} at depth {self.depth} is not allowed by the title trie; "
            "another logits processor or sampling parameter overrides the trie mask"
        )


@dataclass(frozen=True)
class TrieRequest:
    """What a vLLM request tells the logits processor, carried in SamplingParams.extra_args."""

    label: str
    """Names the request in errors."""
    node: int | None
    """Trie node at which its output starts; None: no constraint, log-probabilities only."""

    def extra_args(self) -> dict[str, Any]:
        return {"trie_request": self.label, "trie_node": self.node}

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> "TrieRequest":
        """Raises ValueError for a request that does not say where it stands: it would run unconstrained."""
        extra_args = extra_args or {}
        node = extra_args.get("trie_node")
        if "trie_node" not in extra_args or not (node is None or (isinstance(node, int) and node >= 0)):
            raise ValueError(
                f"extra_args {extra_args} must hold trie_node: a node of the title trie (0 is its root), or None "
                "for a request without constraint"
            )
        return cls(str(extra_args.get("trie_request", "without a label")), node)


class TrieMask:
    """Walks rows along the trie and masks their logits, on the device of the trie.

    >>> nodes = mask.step(nodes, tokens)                 # after each generated token
    >>> mask.constrain_(logits, rows, nodes)             # before the next
    """

    def __init__(self, trie: DeviceTrie, eos_token: int, logprob_space: LogprobSpace) -> None:
        self.trie = trie
        self.eos_token = eos_token
        self.logprob_space = logprob_space
        largest_fanout = int(torch.diff(trie.first_edge).max())
        self._halvings = largest_fanout.bit_length()

    def step(self, nodes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [R]: where tokens [R] lead from nodes [R]: a node, ENDED (also from there on), or LEFT.

        Bisects each node's sorted edges, all rows at once and without waiting for the device.
        """
        start = nodes.clamp_min(0)
        low, end = self.trie.first_edge[start], self.trie.first_edge[start + 1]
        high = end
        for _ in range(self._halvings):
            middle = (low + high) // 2
            right = (low < high) & (self.trie.edge_token[middle.clamp_max(len(self.trie.edge_token) - 1)] < tokens)
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
        edge = low.clamp_max(len(self.trie.edge_token) - 1)
        found = (low < end) & (self.trie.edge_token[edge] == tokens)
        target = self.trie.edge_target[edge].long().clamp_min(ENDED)
        return torch.where(nodes < 0, nodes, torch.where(found, target, LEFT))

    def constrain_(self, logits: torch.Tensor, rows: torch.Tensor, nodes: torch.Tensor) -> None:
        """In logits [N, V] float32, replace rows [R], which stand at nodes [R] (none of them LEFT).

        An allowed token gets its log-probability: over the whole vocabulary, or renormalised over the allowed ones
        (logprob_space "trie"); every other token gets -inf. After the end only end-of-sequence remains, at 0.
        """
        for some_rows, some_nodes in _chunks(rows, nodes):
            row, edge = self._edges(some_nodes)
            token = self.trie.edge_token[edge].long()
            normaliser = None
            if self.logprob_space == "vocabulary":
                normaliser = torch.logsumexp(logits[some_rows], -1)
            values = logits[some_rows[row], token]
            if normaliser is None:
                normaliser = _segment_logsumexp(values, row, len(some_rows))
            logits.index_fill_(0, some_rows, float("-inf"))
            logits[some_rows[row], token] = values - normaliser[row]
            logits[some_rows[some_nodes == ENDED], self.eos_token] = 0.0

    def normalise_(self, logits: torch.Tensor, rows: torch.Tensor) -> None:
        """In logits [N, V] float32, replace rows [R] by log-probabilities over the whole vocabulary, unconstrained."""
        for some_rows, _ in _chunks(rows, rows):
            logits[some_rows] = torch.log_softmax(logits[some_rows], -1)

    def _edges(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(row, edge) of every allowed edge of nodes [R], ended ones having none."""
        start = nodes.clamp_min(0)
        first = self.trie.first_edge[start]
        count = torch.where(nodes >= 0, self.trie.first_edge[start + 1] - first, 0)
        row = torch.repeat_interleave(count)
        offset = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        return row, first[row] + offset


def _chunks(rows: torch.Tensor, nodes: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A few rows at a time, so that copies of [rows, vocabulary] stay small."""
    return zip(rows.split(_ROWS_PER_CHUNK), nodes.split(_ROWS_PER_CHUNK), strict=True)


def _segment_logsumexp(values: torch.Tensor, segment: torch.Tensor, segments: int) -> torch.Tensor:
    """float32 [segments]: logsumexp of values [E] within each segment [E]."""
    largest = values.new_full((segments,), float("-inf")).scatter_reduce(0, segment, values, "amax")
    total = values.new_zeros(segments).scatter_add(0, segment, (values - largest[segment]).exp())
    return largest + total.log()
