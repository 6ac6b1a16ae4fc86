"""The most likely children of trie nodes, from the model's logits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch

from rollout.config import LogprobSpace
from rollout.device_trie import DeviceTrie
from rollout.largest import first_largest
from rollout.logsumexp import logsumexp

NEG_INF = float("-inf")
_ON_CPU, _ON_CUDA = (1, 1 << 21), (3, 1 << 24)
"""(doublings, elements) of _fanout_buckets: on a GPU every bucket costs launches, so that there are fewer."""
_FEW = 1 << 16
"""Elements that are computed sooner than more than one bucket."""


@dataclass(frozen=True)
class Children:
    """The best children of R nodes, padded to W: -inf where there is none, NaN where logits are not finite."""

    logprob: torch.Tensor
    """float32 [R, W]: what is reported and, in beam search, summed."""
    edge: torch.Tensor
    """int64 [R, W]"""
    key: torch.Tensor | None = None
    """[R, W]: what they are ordered by, where that is not the log-probability."""
    policy: torch.Tensor | None = None
    """float64 [R, W]: log-probability among the node's children, where a search asks for it."""

    def map(self, change: Callable[[torch.Tensor, float], torch.Tensor]) -> "Children":
        """change: makes a new column of each [R, W], given what it is padded with."""
        padding = {name: 0 if name == "edge" else NEG_INF for name in self.columns()}
        return Children(**{name: change(values, padding[name]) for name, values in self.columns().items()})

    def gather(self, index: torch.Tensor) -> "Children":
        """Those of each node at index, int64 [R, W']."""
        return self.map(lambda values, _: values.gather(1, index))

    def to_host(self) -> "Children":
        """The same on the host, with one transfer, for which it waits."""
        if self.edge.device.type == "cpu":
            return self
        columns = self.columns()
        there = torch.stack([values.double() for values in columns.values()])  # which holds each of them exactly
        names_and_values = zip(columns.items(), there.cpu(), strict=True)
        return Children(**{name: values.to(column.dtype) for (name, column), values in names_and_values})

    def columns(self) -> dict[str, torch.Tensor]:
        """Those that it has, by name."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: values for name, values in columns.items() if values is not None}

    @classmethod
    def cat(cls, pieces: "Sequence[Children]") -> "Children":
        """Rows of all pieces, padded to the widest."""
        if len(pieces) == 1:
            return pieces[0]
        rows = np.cumsum([0, *(len(piece.edge) for piece in pieces)]).tolist()
        return _assembled(
            [(slice(*ends), piece) for ends, piece in zip(pairwise(rows), pieces, strict=True)], rows[-1]
        )


Key = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(row [r], edge [r, w], raw logits of the children [r, w], -inf where there is none) -> key, policy [r, w]."""


def top_children(
    trie: DeviceTrie,
    logits: torch.Tensor,
    node: torch.Tensor,
    fanout: np.ndarray,
    keep: int,
    space: LogprobSpace,
    key: Key | None = None,
) -> Children:
    """The `keep` best children of each node, by log-probability or by `key`.

    logits: [R, V]. node: int64 [R]. fanout: int64 [R], on the host. Best first, of equal keys the lower token; without
    a `key`, nodes of at most `keep` children may have them in the order of tokens.
    """
    normaliser = _over_vocabulary(logits) if space == "vocabulary" else None
    pieces = []
    for row, edge, raw in _expanded(trie, logits, node, fanout):
        logprob = _normalised(raw, row, normaliser)
        found = Children(logprob, edge) if key is None else Children(logprob, edge, *key(row, edge, raw))
        if edge.shape[1] > keep or (edge.shape[1] > 1 and key is not None):
            by = logprob if found.key is None else found.key
            found = found.gather(first_largest(by, keep))
        pieces.append((row, found))
    return _assembled(pieces, len(fanout))


def draw_children(
    trie: DeviceTrie,
    logits: torch.Tensor,
    node: torch.Tensor,
    fanout: np.ndarray,
    numbers: torch.Tensor,
    temperature: float,
    space: LogprobSpace,
) -> Children:
    """Children drawn from softmax(logits / temperature) over those that each node has, one per uniform number.

    logits, node, fanout: see top_children. numbers: float64 [R, W] in (0, 1). The result has W columns, in that order.
    """
    normaliser = _over_vocabulary(logits) if space == "vocabulary" else None
    pieces = []
    for row, edge, raw in _expanded(trie, logits, node, fanout):
        drawn = torch.minimum(drawn_index(raw, temperature, numbers[row]), (trie.fanout(node[row]) - 1)[:, None])
        logprob = _normalised(raw, row, normaliser).gather(1, drawn)
        logprob = torch.where(logprob > NEG_INF, logprob, torch.nan)  # nothing can be drawn
        pieces.append((row, Children(logprob, edge.gather(1, drawn))))
    return _assembled(pieces, len(fanout))


def drawn_index(logits: torch.Tensor, temperature: float | torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """int64 [R, D]: what D uniform numbers in (0, 1) for each row draw from softmax(logits / temperature).

    logits: [R, W], -inf for what is never drawn. temperature: one, or [R, 1]. numbers: float64 [R, D].
    """
    below = logits.double() - logits.amax(1, keepdim=True)  # which no temperature divides beyond what is finite
    cumulative = (below / temperature).softmax(1).cumsum(1)
    drawn = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)
    return drawn.clamp_max(logits.shape[1] - 1)


def _expanded(
    trie: DeviceTrie, logits: torch.Tensor, node: torch.Tensor, fanout: np.ndarray
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A bounded piece at a time: rows [r], their edges [r, w], float32 logits of these, -inf where there is none.

    Nodes are taken in buckets of similar fan-out, so memory follows the number of edges and not the widest node.
    """
    for rows in _fanout_buckets(fanout, *(_ON_CPU if node.device.type == "cpu" else _ON_CUDA)):
        row, widest = torch.from_numpy(rows).to(node.device, non_blocking=True), int(fanout[rows].max())
        first = trie.first_edge[node[row]][:, None]
        edge = first + torch.arange(widest, device=node.device)
        if int(fanout[rows].min()) == widest:
            exists = None
        else:
            exists = edge < trie.first_edge[node[row] + 1][:, None]
            edge = torch.where(exists, edge, first)
        token = trie.edge_token[edge].long()
        raw = (logits.gather(1, token) if len(rows) == len(logits) else logits[row[:, None], token]).float()
        yield row, edge, raw if exists is None else torch.where(exists, raw, NEG_INF)


def _over_vocabulary(logits: torch.Tensor) -> torch.Tensor:
    """float32 [R]: logsumexp of logits [R, V], NaN where it is not finite, so that all children of the row are."""
    normaliser = logsumexp(logits)
    return torch.where(normaliser.isfinite(), normaliser, torch.nan)


def _normalised(raw: torch.Tensor, row: torch.Tensor, normaliser: torch.Tensor | None) -> torch.Tensor:
    """Log-probabilities over the vocabulary (normaliser: logsumexp of every row), or over the children."""
    return raw - (raw.logsumexp(1) if normaliser is None else normaliser[row])[:, None]


def _assembled(pieces: Sequence[tuple[torch.Tensor | slice, Children]], rows: int) -> Children:
    """Pieces of all rows put into the order of rows and padded to the widest."""
    if len(pieces) == 1:
        return pieces[0][1]
    width = max(found.edge.shape[1] for _, found in pieces)
    whole = pieces[0][1].map(lambda values, padding: values.new_full((rows, width), padding))
    columns = whole.columns()
    for row, found in pieces:
        for name, values in found.columns().items():
            columns[name][row, : values.shape[1]] = values
    return whole


def _fanout_buckets(fanout: np.ndarray, doublings: int, elements: int) -> list[np.ndarray]:
    """Rows in buckets whose fan-outs differ by less than 2^doublings and whose padded size is at most `elements`.

    All in one where that is small.
    """
    if len(fanout) * int(fanout.max(initial=0)) <= _FEW:
        return [np.arange(len(fanout))]
    order = np.argsort(fanout, kind="stable")
    size = np.frexp(fanout[order] - 0.5)[1] // doublings
    buckets = [np.sort(bucket) for bucket in np.split(order, np.flatnonzero(np.diff(size)) + 1)]
    rows = [max(1, elements // int(fanout[bucket].max())) for bucket in buckets]
    return [bucket[i : i + n] for bucket, n in zip(buckets, rows, strict=True) for i in range(0, len(bucket), n)]
