"""Trie-constrained beam search as pure tensor maths: no model, no cache, no per-beam Python."""

import numpy as np
import torch

from rollout.children import NEG_INF, Children, DeviceTrie, top_children
from rollout.config import LogprobSpace
from rollout.frontier import Frontier
from rollout.groups import Candidates
from rollout.history import Past, Pool, Steps
from rollout.known import Known


class BeamSearch:
    """Beam search with the semantics of Hugging Face `generate` at length penalty 0, for many groups at once.

    Of every group's running beams the 2G best continuations are looked at: those that end a title and rank among the
    first G enter the pool of the best G finished titles, and the G best others go on. A running beam that the worst of
    a full pool beats can never enter it, since scores only fall: it is dropped, which changes no result. Ties: the
    earlier beam, then the lower token; what is in the pool stays before what comes.

    A group moves on as far as its beams' children are known, independently of other groups. With lookahead > 1, up to
    that many nodes of a forced chain are scored at once; the results are the same. Driven as TrieSearch says.
    """

    def __init__(
        self, trie: DeviceTrie, groups: int, beams: int, space: LogprobSpace = "vocabulary", lookahead: int = 1
    ) -> None:
        shape, device = (groups, beams), trie.device
        self.trie, self.groups, self.beams, self.space = trie, groups, beams, space
        self.lookahead = min(lookahead, trie.max_tokens)
        self._node = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._node[:, 0] = 0
        self._origin = self._node.clone()
        self._token = torch.zeros(shape, dtype=torch.int32, device=device)
        self._score = torch.full(shape, NEG_INF, device=device)
        self._score[:, 0] = 0
        self._policy = self._score.double()
        self._depth = torch.zeros(groups, dtype=torch.int64, device=device)
        self._free_chains = space == "trie"
        """Whether a beam with one title below it needs no more scores: its tokens all have log-probability 0."""
        self._asks_often = device.type == "cpu"
        """Whether asking what is on the device costs less than work that may be needless."""
        self._known = Known(trie, groups, beams, self.lookahead)
        self._past = Past(trie, groups, beams)
        self._pool = Pool.empty(groups, beams, device)

    def frontier(self) -> Frontier:
        """See TrieSearch."""
        running = self._node >= 0
        node, token, count = self._chains(running & ~self._known.scored & ~self._free())
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

    def children(self, frontier: Frontier, rows: slice, logits: torch.Tensor) -> Children:
        """See TrieSearch: the 2G most likely."""
        return top_children(self.trie, logits, frontier.node[rows], frontier.fanout[rows], 2 * self.beams, self.space)

    def advance(self, frontier: Frontier, children: Children) -> None:
        """See TrieSearch: every group moves on as far as the children of its beams are known."""
        self._known.learn(frontier, children)
        steps = 0
        while True:
            running = self._node >= 0
            ready = running.any(1) & (self._known.scored | self._free() | ~running).all(1)
            if (self._asks_often or steps >= self.lookahead) and not bool(ready.any()):
                return
            self._step(ready)
            steps += 1

    def _step(self, ready: torch.Tensor) -> None:
        """One token for every ready group."""
        children = self._known.next(self._node)
        if self._free_chains:
            children = children.only_child(self._free(), self.trie.first_edge[self._node.clamp_min(0)], 0.0)
        steps = self._best_steps(children)
        target = self.trie.edge_target[steps.edge].long()
        possible = (steps.score > NEG_INF) & ready[:, None]
        ended = possible & (target < 0)
        ended[:, self.beams :] = False
        if not self._asks_often or bool(ended.any()):
            self._pool = self._pool.best_with(Pool.of(ended, steps, -1 - target, self._depth))

        goes_on = possible & (target >= 0)
        first = (~goes_on).to(torch.int8).argsort(dim=1, stable=True)[:, : self.beams]
        first = torch.nn.functional.pad(first, (0, self.beams - first.shape[1]))
        rank = torch.arange(self.beams, device=first.device)
        steps, target = steps.gather(first), target.gather(1, first)
        alive = (rank < goes_on.sum(1, keepdim=True)) & (steps.score > self._pool.score[:, -1:])
        self._follow(ready, alive, steps, target)

    def _free(self) -> torch.Tensor:
        """bool [P, G]: running beams whose scores are known to the end of their title; never the root."""
        if not self._free_chains:
            return torch.zeros_like(self._node, dtype=torch.bool)
        below = self.trie.forced_to_end[self._node.clamp_min(0)]
        return below & (self._node >= 0) & (self._depth > 0)[:, None]

    def _best_steps(self, children: Children) -> Steps:
        """The 2G best steps from the children [P, G, W] of all beams."""
        width = children.logprob.shape[2]
        score = (self._score[..., None] + children.logprob).flatten(1)
        score, order = score.sort(dim=1, descending=True, stable=True)
        score, order = score[:, : 2 * self.beams], order[:, : 2 * self.beams]
        edge, logprob = (values.flatten(1).gather(1, order) for values in (children.edge, children.logprob))
        return Steps(score, order // width, edge, logprob, score.double())

    def _follow(self, ready: torch.Tensor, alive: torch.Tensor, steps: Steps, target: torch.Tensor) -> None:
        """Beams of the ready groups are replaced by `steps` [P, G], where these are alive."""
        change = ready[:, None]
        self._past.record(self._depth, ready, steps)
        self._known.follow(ready, steps.parent)
        self._depth = self._depth + ready

        def renew(old: torch.Tensor, new: torch.Tensor, otherwise: float) -> torch.Tensor:
            return torch.where(change, torch.where(alive, new, otherwise), old)

        self._origin = renew(self._origin, self._origin.gather(1, steps.parent), -1)
        self._node = renew(self._node, target, -1)
        self._token = renew(self._token, self.trie.edge_token[steps.edge], 0)
        self._score = renew(self._score, steps.score, NEG_INF)
        self._policy = renew(self._policy, steps.policy, NEG_INF)

    def results(self) -> list[Candidates]:
        """See TrieSearch: fewer than G candidates where the catalogue has fewer titles."""
        pool = self._pool
        score, item_class, depth = (values.cpu().numpy() for values in (pool.score, pool.item_class, pool.depth))
        tokens, logprobs = self._past.trace(pool.beam.cpu().numpy(), depth)
        np.put_along_axis(tokens, depth[..., None], self.trie.source.eos_token, 2)
        np.put_along_axis(logprobs, depth[..., None], pool.logprob.cpu().numpy()[..., None], 2)
        groups = []
        for group, found in enumerate(score > NEG_INF):
            length = depth[group][found] + 1
            groups.append(
                Candidates(
                    tokens=[row[:n] for row, n in zip(tokens[group][found], length, strict=True)],
                    logprobs=[row[:n] for row, n in zip(logprobs[group][found], length, strict=True)],
                    item_class=item_class[group][found].astype(np.int32),
                    score=score[group][found].astype(np.float32),
                )
            )
        return groups
