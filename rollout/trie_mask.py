"""The trie as a mask over logits: the core of the logits processors, free of vLLM.

A row of logits stands at a node of the trie. `step` moves it along a generated token, `constrain_` turns its logits
into the log-probabilities of the tokens that the trie allows there. A row that samples keeps only the token that its
random number chooses, so that whatever picks the likeliest token next picks this one, with its log-probability.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rollout.children import drawn_index
from rollout.config import LogprobSpace
from rollout.device_trie import DeviceTrie
from rollout.noise import seed_tensor, uniform

ENDED = -1
"""Node of a row whose title has ended."""
LEFT = -2
"""Node of a row that generated a token which the trie does not allow."""
_ROWS_PER_CHUNK = 64


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
    temperature: float = 0.0
    """Of the sample that it draws; 0: it draws none, and every allowed token keeps its log-probability."""
    seed: int = 0
    """Of the group."""
    sample: int = 0
    """Which of the group's samples it is."""

    def extra_args(self) -> dict[str, Any]:
        return {
            "trie_request": self.label,
            "trie_node": self.node,
            "trie_temperature": self.temperature,
            "trie_seed": int(self.seed) % 2**64,  # vLLM takes no larger integers
            "trie_sample": self.sample,
        }

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
        label, temperature = extra_args.get("trie_request", "without a label"), extra_args.get("trie_temperature", 0.0)
        seed, sample = extra_args.get("trie_seed", 0), extra_args.get("trie_sample", 0)
        return cls(str(label), node, float(temperature), int(seed), int(sample))


@dataclass(frozen=True)
class Sampling:
    """How rows sample: by the inverse of their cumulative distribution, as the worker engine does."""

    temperature: torch.Tensor
    """float64 [R]; 0 where a row does not sample."""
    number: torch.Tensor
    """float64 [R] in (0, 1): a function of (seed, sample, depth), so that a draw does not depend on its batch."""

    @classmethod
    def of(cls, requests: Sequence[TrieRequest], depths: Sequence[int], device: torch.device) -> "Sampling | None":
        """None where no request samples. depths: tokens that each request has generated."""
        if all(request.temperature == 0 for request in requests):
            return None
        host = torch.device("cpu")
        temperature = torch.tensor([request.temperature for request in requests], dtype=torch.float64)
        seed = seed_tensor([request.seed for request in requests], host)
        number = uniform(seed, torch.tensor([request.sample for request in requests]), torch.tensor(list(depths)))
        return cls(temperature.to(device, non_blocking=True), number.to(device, non_blocking=True))

    def __getitem__(self, rows: slice) -> "Sampling":
        return Sampling(self.temperature[rows], self.number[rows])

    @property
    def divisor(self) -> torch.Tensor:
        """float64 [R]: the temperature, or 1 where a row does not sample."""
        return torch.where(self.temperature > 0, self.temperature, 1.0)


class TrieMask:
    """Walks rows along the trie and masks their logits, on the device of the trie.

    >>> nodes = mask.step(nodes, tokens)                 # after each generated token
    >>> mask.constrain_(logits, rows, nodes)             # before the next
    """

    def __init__(self, trie: DeviceTrie, logprob_space: LogprobSpace) -> None:
        self.trie = trie
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

    def constrain_(
        self, logits: torch.Tensor, rows: torch.Tensor, nodes: torch.Tensor, sampling: Sampling | None = None
    ) -> None:
        """In logits [N, V] float32, replace rows [R], which stand at nodes [R] (none of them LEFT).

        An allowed token gets its log-probability: over the whole vocabulary, or renormalised over the allowed ones
        (logprob_space "trie"); every other token gets -inf, and so does all but the sample in rows that sample: from
        the allowed tokens, in proportion to their probabilities at its temperature. After the end only end-of-sequence
        remains, at 0. All of them are NaN where the logits are not finite. Waits for the device once.
        """
        counts = self._count(nodes).tolist()
        for chunk in _chunks(len(rows)):
            some_rows, some_nodes = rows[chunk], nodes[chunk]
            row, edge = self._edges(some_nodes, sum(counts[chunk]))
            token = self.trie.edge_token[edge].long()
            values = logits[some_rows[row], token]
            if self.logprob_space == "vocabulary":
                normaliser = torch.logsumexp(logits[some_rows], -1)
            else:
                normaliser = _segment_logsumexp(values, row, len(some_rows))
            logprobs = values - torch.where(normaliser.isfinite(), normaliser, torch.nan)[row]
            if sampling is not None:
                chosen = self._chosen(values, row, some_nodes, sampling[chunk])
                logprobs = torch.where(chosen | (sampling[chunk].temperature[row] == 0), logprobs, float("-inf"))
            logits.index_fill_(0, some_rows, float("-inf"))
            logits[some_rows[row], token] = logprobs
            eos_token = self.trie.source.eos_token
            end = logits[some_rows, eos_token]
            logits[some_rows, eos_token] = torch.where(some_nodes == ENDED, 0.0, end)

    def normalise_(self, logits: torch.Tensor, rows: torch.Tensor, sampling: Sampling | None = None) -> None:
        """In logits [N, V] float32, replace rows [R] by log-probabilities over the whole vocabulary, unconstrained.

        All but the sample becomes -inf in rows that sample.
        """
        for chunk in _chunks(len(rows)):
            some_rows = rows[chunk]
            values = logits[some_rows]
            logprobs = torch.log_softmax(values, -1)
            if sampling is not None:
                some = sampling[chunk]
                chosen = drawn_index(values, some.divisor[:, None], some.number[:, None])
                sample = torch.full_like(logprobs, float("-inf")).scatter_(1, chosen, logprobs.gather(1, chosen))
                logprobs = torch.where(some.temperature[:, None] == 0, logprobs, sample)
            logits[some_rows] = logprobs

    def _chosen(
        self, values: torch.Tensor, row: torch.Tensor, nodes: torch.Tensor, sampling: Sampling
    ) -> torch.Tensor:
        """bool [E]: which edge each row draws. values, row: [E], logits and row of each edge; nodes: [R]."""
        below = values.double() - _segment_max(values, row, len(nodes))[row]
        weight = (below / sampling.divisor[row]).exp()
        total = weight.new_zeros(len(nodes)).scatter_add(0, row, weight)
        before = total.cumsum(0) - total
        passed = weight.cumsum(0) - before[row] <= (sampling.number * total)[row]
        drawn = torch.zeros_like(nodes).scatter_add(0, row, passed.long())
        drawn = self._first(nodes) + torch.minimum(drawn, self._count(nodes) - 1)
        return torch.arange(len(row), device=row.device) == drawn[row]

    def _edges(self, nodes: torch.Tensor, edges: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(row, edge) of every allowed edge of nodes [R], of which there are `edges`, ended ones having none."""
        row = torch.repeat_interleave(self._count(nodes), output_size=edges)
        offset = torch.arange(len(row), device=row.device) - self._first(nodes)[row]
        return row, self.trie.first_edge[nodes.clamp_min(0)][row] + offset

    def _count(self, nodes: torch.Tensor) -> torch.Tensor:
        """int64 [R]: allowed edges of each row."""
        return torch.where(nodes >= 0, self.trie.fanout(nodes.clamp_min(0)), 0)

    def _first(self, nodes: torch.Tensor) -> torch.Tensor:
        """int64 [R]: where the edges of each row begin among those of all rows."""
        count = self._count(nodes)
        return count.cumsum(0) - count


def _chunks(rows: int) -> Iterator[slice]:
    """A few rows at a time, so that copies of [rows, vocabulary] stay small."""
    return (slice(start, start + _ROWS_PER_CHUNK) for start in range(0, rows, _ROWS_PER_CHUNK))


def _segment_max(values: torch.Tensor, segment: torch.Tensor, segments: int) -> torch.Tensor:
    """[segments]: the largest of values [E] within each segment [E], -inf in one without values."""
    return values.new_full((segments,), float("-inf")).scatter_reduce(0, segment, values, "amax")


def _segment_logsumexp(values: torch.Tensor, segment: torch.Tensor, segments: int) -> torch.Tensor:
    """float32 [segments]: logsumexp of values [E] within each segment [E]."""
    largest = _segment_max(values, segment, segments)
    total = values.new_zeros(segments).scatter_add(0, segment, (values - largest[segment]).exp())
    return largest + total.log()
