"""Trie-constrained beam search as pure tensor maths: no model, no cache, no per-beam Python."""

import numpy as np
import torch

from rollout.chains import Chains, reach
from rollout.children import NEG_INF, Children, top_children
from rollout.config import ForcedChains, LogprobSpace
from rollout.device_trie import DeviceTrie
from rollout.finite import FiniteCheck
from rollout.frontier import Frontier
from rollout.groups import Candidates
from rollout.history import Past, Pool, Steps
from rollout.largest import first_largest


class BeamSearch:
    """Beam search with the semantics of Hugging Face `generate` at length penalty 0, for many groups at once.

    Of every group's running beams the 2G best continuations are looked at: those that end a title and rank among the
    first G enter the pool of the best G finished titles, and the G best others go on. A running beam that the worst of
    a full pool beats can never enter it, since scores only fall: it is dropped, which changes no result. Ties: the
    earlier beam, then the lower token; what is in the pool stays before what comes.

    Nodes that the beams will come to whatever they score (see Chains) are scored at once: each time it is driven, a
    group walks its forced chains and then takes one step in which its beams compete. Driven as TrieSearch says.
    """

    def __init__(
        self,
        trie: DeviceTrie,
        groups: int,
        beams: int,
        space: LogprobSpace = "vocabulary",
        forced_chains: ForcedChains = "at_once",
    ) -> None:
        shape, device = (groups, beams), trie.device
        self.trie, self.groups, self.beams, self.space = trie, groups, beams, space
        self._node = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._node[:, 0] = 0
        self._origin = self._node.clone()
        self._token = torch.zeros(shape, dtype=torch.int32, device=device)
        self._score = torch.full(shape, NEG_INF, device=device)
        self._score[:, 0] = 0
        self._depth = torch.zeros(groups, dtype=torch.int64, device=device)
        self._goes_ahead = forced_chains == "at_once"
        self._free_chains = space == "trie"
        """Whether a beam with one title below it needs no more scores: its tokens all have log-probability 0."""
        self._asks_often = device.type == "cpu"
        """Whether asking what is on the device costs less than work that may be needless."""
        self._past = Past(trie, groups, beams)
        self._pool = Pool.empty(groups, beams, device)
        self._finite = FiniteCheck(device)

    def frontier(self) -> Frontier:
        """See TrieSearch."""
        running = self._node >= 0
        length, ends = reach(self.trie, self._node, (self._depth > 0) & self._goes_ahead)
        count = torch.where(running & ~self._free(), length + 1, 0)
        fanout = self.trie.fanout_after(self._node.clamp_min(0), length)
        on_host = torch.stack([count, fanout, self._origin, length, ends.long()]).cpu().numpy()
        host_count, fanout, parent, host_length, host_ends = on_host
        longest, any_ends = int(host_length.max()), bool(host_ends.any())
        self._chains = Chains.walked(self.trie, self._node, length, ends, longest, any_ends)
        self._origin = torch.where(running, torch.arange(self.beams, device=running.device), -1)
        slot = np.flatnonzero(host_count)
        counts = host_count.ravel()[slot]
        step = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        fanouts = np.ones(len(step), np.int64)
        fanouts[np.cumsum(counts) - 1] = fanout.ravel()[slot]
        place = np.repeat(slot, counts) * self._chains.node.shape[2] + step
        chosen = torch.from_numpy(place).to(running.device, non_blocking=True)
        token = torch.cat([self._token[..., None], self.trie.edge_token[self._chains.edge[..., :-1]]], -1)
        return Frontier(slot, counts, parent, fanouts, self._chains.node.view(-1)[chosen], token.view(-1)[chosen])

    def children(self, frontier: Frontier, rows: slice, logits: torch.Tensor) -> Children:
        """See TrieSearch: the 2G most likely."""
        return top_children(self.trie, logits, frontier.node[rows], frontier.fanout[rows], 2 * self.beams, self.space)

    def advance(self, frontier: Frontier, children: Children) -> None:
        """See TrieSearch: every group walks its chains, then its beams compete for one step."""
        self._finite.note(children.logprob if children.key is None else children.logprob + children.key)
        of_last, forced = self._of_beams(frontier, children)
        self._walk(self._chains, forced, of_last.logprob[..., 0])
        self._step(of_last)
        if self._free_chains:
            self._end_free_groups()

    def _of_beams(self, frontier: Frontier, children: Children) -> tuple[Children, torch.Tensor]:
        """From the frontier's T nodes, [T, W]: the children of every beam's last node, and the forced [P, G, K]."""
        chains, device = self._chains, self._node.device
        shape, width = self._node.shape, children.logprob.shape[1]
        slot = torch.from_numpy(frontier.slot).to(device, non_blocking=True)
        count = torch.from_numpy(frontier.count).to(device, non_blocking=True)
        last = count.cumsum(0) - 1

        def spread(values: torch.Tensor, padding: float) -> torch.Tensor:
            whole = values.new_full((*shape, width), padding)
            whole.view(-1, width)[slot] = values[last]
            return whole

        of_last = children.map(spread)
        if self._free_chains:
            of_last = of_last.only_child(self._free(), chains.last(chains.edge), 0.0)
        forced = torch.zeros(chains.steps.shape, device=device)
        if forced.shape[2]:
            ahead = torch.arange(forced.shape[2], device=device)
            place = (last - count + 1)[:, None] + torch.minimum(ahead, count[:, None] - 1)
            forced.view(-1, forced.shape[2])[slot] = children.logprob[place, 0]
        return of_last, torch.where(chains.steps, forced, 0.0)

    def _walk(self, chains: Chains, forced: torch.Tensor, end: torch.Tensor) -> None:
        """All beams to the ends of their chains; what ends there goes into the pool.

        forced: float32 [P, G, K], log-probabilities of the chains' tokens. end: [P, G], of end-of-sequence where a
        chain ends its title.
        """
        running = self._node >= 0
        self._past.record_chains(self._depth, chains, forced)
        for logprob in forced.unbind(2):  # in this order, as if token by token
            self._score = self._score + logprob
        self._node = torch.where(running, chains.last(chains.node), -1)
        if chains.any_ends:
            beam = torch.arange(self.beams, device=running.device).expand_as(running)
            edge = chains.last(chains.edge)
            steps = Steps(self._score + end, beam, edge, end)
            item_class = -1 - self.trie.edge_target[edge].long()
            depth = self._depth[:, None] + chains.length
            ended = Pool.of(chains.ends, steps, item_class, depth)
            self._pool = self._pool.best_with(
                ended.gather(depth.argsort(dim=1, stable=True))
            )  # shorter titles came first
            self._node = torch.where(chains.ends, -1, self._node)
        self._depth = self._depth + chains.length.amax(1)  # beams that go on have walked as far as any

    def _step(self, children: Children) -> None:
        """One token for every group, its beams competing; children [P, G, W] of every beam's node."""
        self._score = torch.where(self._node >= 0, self._score, NEG_INF)  # beams that have ended compete no more
        steps = self._best_steps(children)
        target = self.trie.edge_target[steps.edge].long()
        possible = steps.score > NEG_INF
        ended = possible & (target < 0)
        ended[:, self.beams :] = False
        if not self._asks_often or bool(ended.any()):
            self._pool = self._pool.best_with(
                Pool.of(ended, steps, -1 - target, self._depth[:, None].expand_as(ended))
            )

        goes_on = possible & (target >= 0)
        first = (~goes_on).to(torch.int8).argsort(dim=1, stable=True)[:, : self.beams]
        rank = torch.arange(self.beams, device=first.device)
        steps, target = steps.gather(first), target.gather(1, first)
        alive = (rank < goes_on.sum(1, keepdim=True)) & (steps.score > self._pool.score[:, -1:])
        self._follow(alive, steps, target)

    def _free(self) -> torch.Tensor:
        """bool [P, G]: running beams whose scores are known to the end of their title; never the root."""
        if not self._free_chains:
            return torch.zeros_like(self._node, dtype=torch.bool)
        below = self.trie.forced_to_end[self._node.clamp_min(0)]
        return below & (self._node >= 0) & (self._depth > 0)[:, None]

    def _end_free_groups(self) -> None:
        """Groups of which nothing is left to score: all running beams walk to the ends of their titles."""
        chains = Chains.of(self.trie, self._node, ((self._node < 0) | self._free()).all(1))
        nothing = torch.zeros(chains.steps.shape, device=self._node.device)
        self._walk(chains, nothing, torch.zeros_like(self._score))

    def _best_steps(self, children: Children) -> Steps:
        """The 2G best steps from the children [P, G, W] of all beams."""
        width = children.logprob.shape[2]
        score = (self._score[..., None] + children.logprob).flatten(1)
        order = first_largest(score, 2 * self.beams)
        edge, logprob = (values.flatten(1).gather(1, order) for values in (children.edge, children.logprob))
        return Steps(score.gather(1, order), order // width, edge, logprob)

    def _follow(self, alive: torch.Tensor, steps: Steps, target: torch.Tensor) -> None:
        """Beams are replaced by `steps` [P, G] where these are alive; groups that have ended stay at their depth."""
        going = (self._node >= 0).any(1)
        self._past.record(self._depth, steps)
        self._depth = self._depth + going
        self._origin = torch.where(alive, self._origin.gather(1, steps.parent), -1)
        self._node = torch.where(alive, target, -1)
        self._token = torch.where(alive, self.trie.edge_token[steps.edge], 0)
        self._score = steps.score

    def results(self) -> list[Candidates]:
        """See TrieSearch: fewer than G candidates where the catalogue has fewer titles."""
        self._finite.check()
        pool = self._pool
        score, item_class, depth = (values.cpu().numpy() for values in (pool.score, pool.item_class, pool.depth))
        tokens, logprobs = self._past.trace(pool.beam.cpu().numpy(), depth)
        np.put_along_axis(tokens, depth[..., None], self.trie.source.eos_token, 2)
        np.put_along_axis(logprobs, depth[..., None], pool.logprob.cpu().numpy()[..., None], 2)
        groups = []
        for group, found in enumerate(score > NEG_INF):
            length = (depth[group][found] + 1).tolist()
            groups.append(
                Candidates(
                    tokens=[row[:n] for row, n in zip(tokens[group][found], length, strict=True)],
                    logprobs=[row[:n] for row, n in zip(logprobs[group][found], length, strict=True)],
                    item_class=item_class[group][found].astype(np.int32),
                    score=score[group][found].astype(np.float32),
                )
            )
        return groups
