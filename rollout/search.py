"""Trie-constrained beam search as pure tensor maths: no model, no cache, no per-beam Python.

The search is driven from outside. It says which nodes must be scored, is given the log-probabilities of their
children, and moves on:

>>> search = BeamSearch(trie, num_groups, beams)
>>> while (frontier := search.frontier()).size:
...     logits = model(...)                                    # [R, V], one row per beam of the frontier
...     search.advance(frontier, top_children(trie, logits, frontier.node, frontier.fanout, keep=2 * beams))
>>> groups = search.results()
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from catalog.trie import Trie
from rollout.arrays import as_tensor
from rollout.config import LogprobSpace
from rollout.groups import Candidates

NEG_INF = float("-inf")
_GATHER_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class DeviceTrie:
    """The arrays of a catalogue trie on the device that searches; on the CPU they are the trie's own."""

    first_edge: torch.Tensor
    """int64 [N + 1]"""
    edge_token: torch.Tensor
    """int32 [E]"""
    edge_target: torch.Tensor
    """int32 [E]: the child node, or -1 - item_class at end-of-sequence."""
    level_width: np.ndarray
    """int64 [D]: nodes at each depth."""
    source: Trie

    @classmethod
    def of(cls, trie: Trie, device: torch.device | str = "cpu") -> "DeviceTrie":
        first_edge, edge_token, edge_target = (
            as_tensor(array).to(device) for array in (trie.first_edge, trie.edge_token, trie.edge_target)
        )
        return cls(first_edge, edge_token, edge_target, np.diff(trie.level_start, append=trie.num_nodes), trie)

    @property
    def max_tokens(self) -> int:
        return len(self.level_width)

    @property
    def device(self) -> torch.device:
        return self.first_edge.device


@dataclass(frozen=True)
class Children:
    """The best children of R nodes: padded to W per node, best first, -inf where there is none."""

    logprob: torch.Tensor
    """float32 [R, W]"""
    edge: torch.Tensor
    """int64 [R, W]"""

    @classmethod
    def cat(cls, pieces: "Sequence[Children]") -> "Children":
        """Rows of all pieces, padded to the widest."""
        width = max(piece.logprob.shape[1] for piece in pieces)

        def padded(values: torch.Tensor, otherwise: float) -> torch.Tensor:
            return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=otherwise)

        return cls(
            torch.cat([padded(piece.logprob, NEG_INF) for piece in pieces]),
            torch.cat([padded(piece.edge, 0) for piece in pieces]),
        )


@dataclass(frozen=True)
class Frontier:
    """The R beams that must be scored next; host arrays, known after one transfer."""

    slot: np.ndarray
    """int64 [R]: group * beams + beam."""
    fanout: np.ndarray
    """int64 [R]: children of each beam's node."""
    parent: np.ndarray
    """int64 [groups, beams]: the beam of the last frontier that each beam extends, -1 where no beam is running."""
    node: torch.Tensor
    """int64 [R]"""
    token: torch.Tensor
    """int32 [R]: the token that led to each node (undefined at the root)."""

    @property
    def size(self) -> int:
        return len(self.slot)


def top_children(
    trie: DeviceTrie, logits: torch.Tensor, node: torch.Tensor, fanout: np.ndarray, keep: int, space: LogprobSpace
) -> Children:
    """The `keep` most likely children of each node.

    logits: [R, V]. node: int64 [R]. fanout: int64 [R], on the host. Equal log-probabilities: the lower token first.
    Nodes are taken in buckets of similar fan-out, so memory follows the number of edges, not the widest node.
    """
    width = int(min(fanout.max(), keep))
    logprob = logits.new_full((len(fanout), width), NEG_INF, dtype=torch.float32)
    edge = torch.zeros_like(logprob, dtype=torch.int64)
    normaliser = logsumexp(logits) if space == "vocabulary" else None
    for rows_host in _fanout_buckets(fanout):
        rows = torch.from_numpy(rows_host).to(node.device, non_blocking=True)
        first = trie.first_edge[node[rows]][:, None]
        edges = first + torch.arange(int(fanout[rows_host].max()), device=node.device)
        exists = edges < trie.first_edge[node[rows] + 1][:, None]
        edges = torch.where(exists, edges, first)
        values = logits[rows[:, None], trie.edge_token[edges].long()].float()
        values = torch.where(exists, values, NEG_INF)
        values = values - (values.logsumexp(1) if normaliser is None else normaliser[rows])[:, None]
        if values.shape[1] > keep:
            values, order = values.sort(dim=1, descending=True, stable=True)
            values, edges = values[:, :keep], edges.gather(1, order[:, :keep])
        logprob[rows, : values.shape[1]] = values
        edge[rows, : values.shape[1]] = edges
    return Children(logprob, edge)


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """float32 [R] of logits [R, V] in any precision, a few rows at a time: no copy of [R, V] is made."""
    rows = max(1, (1 << 19) // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return torch.cat([chunk.float().logsumexp(1) for chunk in logits.split(rows)])


def _fanout_buckets(fanout: np.ndarray) -> list[np.ndarray]:
    """Rows in buckets whose fan-outs differ by less than a factor of two and whose padded size is bounded."""
    order = np.argsort(fanout, kind="stable")
    size = np.frexp(fanout[order].astype(np.float64) - 0.5)[1]
    buckets = np.split(order, np.flatnonzero(np.diff(size)) + 1)
    rows = [max(1, _GATHER_ELEMENTS // int(fanout[bucket[-1]])) for bucket in buckets]
    return [
        bucket[i : i + step] for bucket, step in zip(buckets, rows, strict=True) for i in range(0, len(bucket), step)
    ]


class BeamSearch:
    """Beam search with the semantics of Hugging Face `generate` at length penalty 0, for many groups at once.

    Of every group's running beams the 2G best continuations are looked at: those that end a title and rank among the
    first G enter the pool of the best G finished titles, and the G best others go on. A running beam that the worst of
    a full pool beats can never enter it, since scores only fall: it is dropped, which changes no result. Ties: the
    earlier beam, then the lower token; what is in the pool stays before what comes.
    """

    def __init__(self, trie: DeviceTrie, num_groups: int, beams: int) -> None:
        shape, device = (num_groups, beams), trie.device
        self.trie, self.beams, self.depth = trie, beams, 0
        self._node = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._node[:, 0] = 0
        self._parent = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._parent[:, 0] = 0
        self._token = torch.zeros(shape, dtype=torch.int32, device=device)
        self._score = torch.full(shape, NEG_INF, device=device)
        self._score[:, 0] = 0
        self._logprobs = torch.zeros(*shape, trie.max_tokens, device=device)
        self._pool_score = torch.full(shape, NEG_INF, device=device)
        self._pool_class = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._pool_logprobs = torch.zeros(*shape, trie.max_tokens, device=device)

    def frontier(self) -> Frontier:
        """What must be scored now; empty when every group is done. The one transfer to the host in a step."""
        running = self._node >= 0
        node = self._node.clamp_min(0)
        fanout = torch.where(running, self.trie.first_edge[node + 1] - self.trie.first_edge[node], 0)
        host_fanout, host_parent = torch.stack([fanout, self._parent]).cpu().numpy()
        slot = np.flatnonzero(host_fanout)
        rows = torch.from_numpy(slot).to(node.device, non_blocking=True)
        return Frontier(
            slot, host_fanout.ravel()[slot], host_parent, self._node.view(-1)[rows], self._token.view(-1)[rows]
        )

    def advance(self, frontier: Frontier, children: Children) -> None:
        """One step for every group: children are those of the frontier's nodes."""
        groups, beams = self._node.shape
        width = children.logprob.shape[1]
        rows = torch.from_numpy(frontier.slot).to(self._node.device, non_blocking=True)
        logprob = torch.full((groups * beams, width), NEG_INF, device=rows.device)
        logprob[rows] = children.logprob
        edge = torch.zeros((groups * beams, width), dtype=torch.int64, device=rows.device)
        edge[rows] = children.edge

        score = (logprob + self._score.view(-1, 1)).view(groups, beams * width)
        score, order = score.sort(dim=1, descending=True, stable=True)
        score, order = score[:, : 2 * beams], order[:, : 2 * beams]
        parent = order // width
        edge = edge.view(groups, -1).gather(1, order)
        logprobs = self._logprobs.gather(1, parent[..., None].expand(-1, -1, self._logprobs.shape[2]))
        logprobs[:, :, self.depth] = logprob.view(groups, -1).gather(1, order)
        target = self.trie.edge_target[edge].long()
        possible = score > NEG_INF
        ends = possible & (target < 0)
        self._pool(torch.where(ends, score, NEG_INF)[:, :beams], -1 - target[:, :beams], logprobs[:, :beams])
        self._continue(possible & ~ends, score, parent, edge, target, logprobs)
        self.depth += 1

    def _pool(self, score: torch.Tensor, item_class: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Keep the best of the pool and of what ended now."""
        score = torch.cat([self._pool_score, score], 1)
        score, order = score.sort(dim=1, descending=True, stable=True)
        order = order[:, : self.beams]
        self._pool_score = score[:, : self.beams]
        self._pool_class = torch.cat([self._pool_class, item_class], 1).gather(1, order)
        order = order[..., None].expand(-1, -1, logprobs.shape[2])
        self._pool_logprobs = torch.cat([self._pool_logprobs, logprobs], 1).gather(1, order)

    def _continue(
        self,
        goes_on: torch.Tensor,
        score: torch.Tensor,
        parent: torch.Tensor,
        edge: torch.Tensor,
        target: torch.Tensor,
        logprobs: torch.Tensor,
    ) -> None:
        """The first G that go on are the running beams, unless the worst of a full pool beats them already."""
        first = (~goes_on).to(torch.int8).argsort(dim=1, stable=True)[:, : self.beams]
        score = score.gather(1, first)
        running = goes_on.gather(1, first) & (score > self._pool_score[:, -1:])
        pad = self.beams - running.shape[1]

        def kept(values: torch.Tensor, otherwise: float) -> torch.Tensor:
            values = torch.where(running, values, otherwise)
            return torch.nn.functional.pad(values, (0, pad), value=otherwise)

        self._score = kept(score, NEG_INF)
        self._parent = kept(parent.gather(1, first), -1)
        self._token = kept(self.trie.edge_token[edge.gather(1, first)], 0)
        self._node = kept(target.gather(1, first), -1)
        logprobs = logprobs.gather(1, first[..., None].expand(-1, -1, logprobs.shape[2]))
        self._logprobs = torch.nn.functional.pad(logprobs, (0, 0, 0, pad))

    def results(self) -> list[Candidates]:
        """The pool of every group, best first: fewer than G candidates where the catalogue has fewer titles."""
        score, item_class = self._pool_score.cpu().numpy(), self._pool_class.cpu().numpy()
        logprobs = self._pool_logprobs.cpu().numpy()
        return [
            candidates(self.trie.source, item_class[group][found], logprobs[group][found], score[group][found])
            for group, found in enumerate(score > NEG_INF)
        ]


def candidates(trie: Trie, item_class: np.ndarray, logprobs: np.ndarray, score: np.ndarray) -> Candidates:
    """item_class: int [n]. logprobs: float32 [n, D], padded. score: float32 [n]."""
    tokens = [np.asarray(trie.title_tokens(int(title)), np.int32) for title in item_class]
    return Candidates(
        tokens=tokens,
        logprobs=[row[: len(title)] for row, title in zip(logprobs, tokens, strict=True)],
        item_class=item_class.astype(np.int32),
        score=score,
    )
