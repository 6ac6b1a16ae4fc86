"""Trie-constrained beam search as pure tensor maths: no model, no cache, no per-beam Python.

The search is driven from outside. It says which nodes must be scored, is given their best children, and moves on:

>>> search = BeamSearch(trie, num_groups, beams)
>>> while (frontier := search.frontier()).size:
...     logits = model(frontier.token, ...)                       # [T, V]
...     search.advance(frontier, top_children(trie, logits, frontier.node, frontier.fanout, search.keep, space))
>>> groups = search.results()
"""

from dataclasses import dataclass

import numpy as np
import torch

from rollout.children import NEG_INF, Children, DeviceTrie
from rollout.groups import Candidates


@dataclass(frozen=True)
class Frontier:
    """What must be scored next: R beams, each at T_r successive nodes of a forced chain, T in all.

    Arrays on the host are known after one transfer; tensors stay on the device.
    """

    slot: np.ndarray
    """int64 [R]: group * beams + beam."""
    count: np.ndarray
    """int64 [R]: nodes to score for each beam, at least one."""
    parent: np.ndarray
    """int64 [P, G]: the beam, at the last frontier, that each beam extends; -1 where none is running."""
    fanout: np.ndarray
    """int64 [T]: children of each node."""
    node: torch.Tensor
    """int64 [T]"""
    token: torch.Tensor
    """int32 [T]: the token that leads to each node (undefined at the root)."""

    @property
    def size(self) -> int:
        return len(self.slot)


@dataclass
class _Known:
    """What running beams know beyond their node: log-probabilities of a forced chain, then the children at its end."""

    forced: torch.Tensor
    """float32 [P, G, lookahead - 1]: of the forced tokens to come, the next one first."""
    forced_left: torch.Tensor
    """int64 [P, G]: how many of them remain."""
    children: Children
    """[P, G, W] each: children of the node after the forced tokens."""
    scored: torch.Tensor
    """bool [P, G]: whether `children` holds."""


class BeamSearch:
    """Beam search with the semantics of Hugging Face `generate` at length penalty 0, for many groups at once.

    Of every group's running beams the 2G best continuations are looked at: those that end a title and rank among the
    first G enter the pool of the best G finished titles, and the G best others go on. A running beam that the worst of
    a full pool beats can never enter it, since scores only fall: it is dropped, which changes no result. Ties: the
    earlier beam, then the lower token; what is in the pool stays before what comes.

    A group moves on as far as its beams' children are known, independently of other groups. With lookahead > 1, up to
    that many nodes of a forced chain are scored at once; the results are the same.
    """

    def __init__(self, trie: DeviceTrie, num_groups: int, beams: int, lookahead: int = 1) -> None:
        shape, device = (num_groups, beams), trie.device
        self.trie, self.groups, self.beams = trie, num_groups, beams
        self.keep = 2 * beams
        """Best children of a node that the search looks at."""
        self.lookahead = min(lookahead, trie.max_tokens)
        self._node = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._node[:, 0] = 0
        self._token = torch.zeros(shape, dtype=torch.int32, device=device)
        self._score = torch.full(shape, NEG_INF, device=device)
        self._score[:, 0] = 0
        self._origin = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._origin[:, 0] = 0
        self._depth = torch.zeros(num_groups, dtype=torch.int64, device=device)
        self._known: _Known | None = None
        steps = (num_groups, trie.max_tokens, beams)
        self._past_parent = torch.zeros(steps, dtype=torch.int64, device=device)
        self._past_edge = torch.zeros(steps, dtype=torch.int64, device=device)
        self._past_logprob = torch.zeros(steps, device=device)
        self._pool = _Pool.empty(shape, device)

    def frontier(self) -> Frontier:
        """What must be scored now; empty when every group is done. The one transfer to the host."""
        running = self._node >= 0
        known = self._known.scored if self._known else torch.zeros_like(running)
        node, token, count = self._chains(running & ~known)
        last = node.gather(2, (count - 1).clamp_min(0)[..., None])[..., 0]
        host_count, fanout, parent = torch.stack([count, self.trie.fanout(last), self._origin]).cpu().numpy()
        self._origin = torch.where(running, torch.arange(self.beams, device=node.device), -1)
        slot = np.flatnonzero(host_count)
        counts = host_count.ravel()[slot]
        step = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        place = torch.from_numpy(np.repeat(slot, counts) * self.lookahead + step).to(node.device, non_blocking=True)
        fanouts = np.ones(len(step), np.int64)
        fanouts[np.cumsum(counts) - 1] = fanout.ravel()[slot]
        return Frontier(slot, counts, parent, fanouts, node.view(-1)[place], token.view(-1)[place])

    def _chains(self, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Nodes and tokens [P, G, lookahead] of the forced chain from every wanted beam, and its length [P, G]."""
        trie = self.trie
        node, token = self._node.clamp_min(0), self._token
        nodes, tokens, count, goes_on = [node], [token], wanted.long(), wanted & (self._depth > 0)[:, None]
        for _ in range(self.lookahead - 1):
            edge = trie.first_edge[node]
            child = trie.edge_target[edge].long()
            goes_on = goes_on & (trie.fanout(node) == 1) & (child >= 0)
            node = torch.where(goes_on, child, node)
            nodes.append(node)
            tokens.append(trie.edge_token[edge])
            count = count + goes_on
        return torch.stack(nodes, -1), torch.stack(tokens, -1), count

    def advance(self, frontier: Frontier, children: Children) -> None:
        """Take the children of the frontier's T nodes, and move every group on as far as its beams' are known."""
        self._learn(frontier, children)
        steps = 0
        while True:
            ready = self._ready()
            if (steps >= self.lookahead or ready.device.type == "cpu") and not bool(ready.any()):
                return
            self._step(ready)
            steps += 1

    def _learn(self, frontier: Frontier, children: Children) -> None:
        """Scatter the scores of the frontier's chains to their beams."""
        shape, width, device = (self.groups, self.beams), children.logprob.shape[1], self._node.device
        slot = torch.from_numpy(frontier.slot).to(device, non_blocking=True)
        count = torch.from_numpy(frontier.count).to(device, non_blocking=True)
        last = count.cumsum(0) - 1
        old = self._known

        def spread(values: torch.Tensor, before: torch.Tensor | None, otherwise: float) -> torch.Tensor:
            spread_width = width if before is None else max(width, before.shape[2])
            whole = values.new_full((*shape, spread_width), otherwise)
            if before is not None:
                whole[..., : before.shape[2]] = before
            whole.view(-1, spread_width)[slot] = otherwise
            whole.view(-1, spread_width)[slot, :width] = values[last]
            return whole

        best = Children(
            spread(children.logprob, old.children.logprob if old else None, NEG_INF),
            spread(children.edge, old.children.edge if old else None, 0),
            spread(children.key, old.children.key if old else None, NEG_INF),
        )
        scored = old.scored.clone() if old else torch.zeros(shape, dtype=torch.bool, device=device)
        scored.view(-1)[slot] = True
        forced = old.forced if old else torch.zeros((*shape, self.lookahead - 1), device=device)
        forced_left = old.forced_left if old else torch.zeros(shape, dtype=torch.int64, device=device)
        if self.lookahead > 1:
            ahead = torch.arange(self.lookahead - 1, device=device)
            place = (last - count + 1)[:, None] + torch.minimum(ahead, count[:, None] - 1)
            forced.view(-1, self.lookahead - 1)[slot] = children.logprob[place, 0]
            forced_left.view(-1)[slot] = count - 1
        self._known = _Known(forced, forced_left, best, scored)

    def _ready(self) -> torch.Tensor:
        """bool [P]: groups that still run and know the children of every running beam."""
        assert self._known is not None
        running = self._node >= 0
        return running.any(1) & (self._known.scored | ~running).all(1)

    def _next(self) -> Children:
        """Children of every running beam's node: [P, G, W] each, -inf where a beam is not running."""
        assert self._known is not None
        known, node = self._known, self._node
        children, is_forced = known.children, (known.forced_left > 0)[..., None]
        running = (node >= 0)[..., None]
        logprob, edge, key = children.logprob, children.edge, children.key
        if self.lookahead > 1:
            first = torch.arange(logprob.shape[2], device=node.device) == 0
            forced = torch.where(first, known.forced[..., :1], NEG_INF)
            logprob = torch.where(is_forced, forced, logprob)
            key = torch.where(is_forced, forced.to(key.dtype), key)
            edge = torch.where(is_forced, self.trie.first_edge[node.clamp_min(0)][..., None], edge)
        return Children(torch.where(running, logprob, NEG_INF), edge, torch.where(running, key, NEG_INF))

    def _step(self, ready: torch.Tensor) -> None:
        """One token for every ready group."""
        children = self._next()
        width, keep = children.logprob.shape[2], self.keep
        score = (self._score[..., None] + children.key).flatten(1)
        score, order = score.sort(dim=1, descending=True, stable=True)
        score, order = score[:, :keep], order[:, :keep]
        parent, edge = order // width, children.edge.flatten(1).gather(1, order)
        logprob = children.logprob.flatten(1).gather(1, order)
        target = self.trie.edge_target[edge].long()
        possible = (score > NEG_INF) & ready[:, None]

        ends = possible & (target < 0)
        ended = _Pool(torch.where(ends, score, NEG_INF), -1 - target, parent, logprob, self._depth[:, None] + 0 * edge)
        self._pool = self._pool.best_of(ended.first(self.beams))

        goes_on = possible & (target >= 0)
        first = (~goes_on).to(torch.int8).argsort(dim=1, stable=True)[:, : self.beams]
        first = torch.nn.functional.pad(first, (0, self.beams - first.shape[1]))
        valid = torch.arange(self.beams, device=first.device) < goes_on.sum(1, keepdim=True)
        alive = valid & (score.gather(1, first) > self._pool.score[:, -1:])
        self._replace(ready, alive, *(values.gather(1, first) for values in (score, parent, edge, logprob, target)))

    def _replace(
        self,
        ready: torch.Tensor,
        alive: torch.Tensor,
        score: torch.Tensor,
        parent: torch.Tensor,
        edge: torch.Tensor,
        logprob: torch.Tensor,
        target: torch.Tensor,
    ) -> None:
        """The new beams [P, G] of the ready groups; what their parents knew of a forced chain goes with them."""
        assert self._known is not None
        known, change = self._known, ready[:, None]
        group = torch.arange(self.groups, device=ready.device)
        for past, values in ((self._past_parent, parent), (self._past_edge, edge), (self._past_logprob, logprob)):
            past[group, self._depth] = torch.where(change, values, past[group, self._depth])
        self._depth = self._depth + ready
        if self.lookahead > 1:
            kept = torch.where(change, parent, torch.arange(self.beams, device=ready.device))
            inherit = known.forced_left.gather(1, kept) - change.long()
            wide = kept[..., None]
            forced = known.forced.gather(1, wide.expand(-1, -1, known.forced.shape[2]))
            shifted = torch.nn.functional.pad(forced[..., 1:], (0, 1))
            rows = wide.expand(-1, -1, known.children.logprob.shape[2])
            self._known = _Known(
                torch.where(change[..., None], shifted, forced),
                inherit.clamp_min(0),
                Children(
                    known.children.logprob.gather(1, rows),
                    known.children.edge.gather(1, rows),
                    known.children.key.gather(1, rows),
                ),
                known.scored.gather(1, kept) & ((inherit >= 0) | ~change),
            )
        else:
            known.scored &= ~change
        self._origin = torch.where(change, torch.where(alive, self._origin.gather(1, parent), -1), self._origin)
        self._score = torch.where(change, torch.where(alive, score, NEG_INF), self._score)
        self._node = torch.where(change, torch.where(alive, target, -1), self._node)
        self._token = torch.where(change, self.trie.edge_token[edge], self._token)

    def results(self) -> list[Candidates]:
        """The pool of every group, best first: fewer than G candidates where the catalogue has fewer titles."""
        score, item_class, beam, logprob, depth = (values.cpu().numpy() for values in self._pool.fields())
        past_parent, past_logprob = self._past_parent.cpu().numpy(), self._past_logprob.cpu().numpy()
        tokens_of = self.trie.edge_token
        past_token = tokens_of[self._past_edge].cpu().numpy()
        shape = (*score.shape, self.trie.max_tokens)
        tokens, logprobs = np.full(shape, self.trie.source.eos_token, np.int32), np.zeros(shape, np.float32)
        group = np.arange(self.groups)[:, None]
        np.put_along_axis(logprobs, depth[..., None], logprob[..., None], 2)
        for step in range(self.trie.max_tokens - 2, -1, -1):
            before = step < depth
            at = beam * before
            tokens[..., step] = np.where(before, past_token[group, step, at], tokens[..., step])
            logprobs[..., step] = np.where(before, past_logprob[group, step, at], logprobs[..., step])
            beam = np.where(before, past_parent[group, step, at], beam)
        return [
            Candidates(
                tokens=[row[: length + 1] for row, length in zip(tokens[g][found], depth[g][found], strict=True)],
                logprobs=[row[: length + 1] for row, length in zip(logprobs[g][found], depth[g][found], strict=True)],
                item_class=item_class[g][found].astype(np.int32),
                score=score[g][found].astype(np.float32),
            )
            for g, found in enumerate(score > NEG_INF)
        ]


@dataclass(frozen=True)
class _Pool:
    """Finished titles of every group, best first: [P, G] each."""

    score: torch.Tensor
    item_class: torch.Tensor
    parent: torch.Tensor
    """The beam, at the depth where the title ended, whose end-of-sequence this is."""
    logprob: torch.Tensor
    """Of the end-of-sequence token."""
    depth: torch.Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int], device: torch.device) -> "_Pool":
        zeros = torch.zeros(shape, dtype=torch.int64, device=device)
        return cls(
            torch.full(shape, NEG_INF, device=device), zeros - 1, zeros, torch.zeros(shape, device=device), zeros
        )

    def fields(self) -> tuple[torch.Tensor, ...]:
        return self.score, self.item_class, self.parent, self.logprob, self.depth

    def first(self, count: int) -> "_Pool":
        return _Pool(*(values[:, :count] for values in self.fields()))

    def best_of(self, others: "_Pool") -> "_Pool":
        """As many as there were, the best of these and the others; of equals, these first."""
        score, order = torch.cat([self.score, others.score], 1).sort(dim=1, descending=True, stable=True)
        order = order[:, : self.score.shape[1]]
        rest = (
            torch.cat([mine, theirs], 1).gather(1, order)
            for mine, theirs in zip(self.fields()[1:], others.fields()[1:], strict=True)
        )
        return _Pool(score[:, : self.score.shape[1]], *rest)
