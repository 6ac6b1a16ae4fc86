"""Trie-constrained beam search: no model, no cache, and no Python for single beams."""

import numpy as np
import torch

from rollout.beams import Beams, Pool, TrieArrays, compete, finish_free, look_ahead, trace, walk
from rollout.children import Children, top_children
from rollout.config import ForcedChains, LogprobSpace
from rollout.device_trie import DeviceTrie
from rollout.finite import check_finite
from rollout.frontier import Frontier
from rollout.groups import Candidates


class BeamSearch:
    """Beam search with the semantics of Hugging Face `generate` at length penalty 0, for many groups at once.

    Of every group's running beams the 2G best continuations are looked at: those that end a title and rank among the
    first G enter the pool of the best G finished titles, and the G best others go on. A running beam that the worst of
    a full pool beats can never enter it, since scores only fall: it is dropped, which changes no result. Ties: the
    earlier beam, then the lower token; what is in the pool stays before what comes.

    Nodes that the beams will come to whatever they score are scored at once: each time it is driven, a group walks its
    forced chains and then takes one step in which its beams compete. The device chooses the children of every node
    from its logits; the host has them compete, in compiled loops. Driven as TrieSearch says.
    """

    _carried: int = 0
    _dtype: type = np.float32
    """Numbers that a beam carries along, and the precision of scores."""

    def __init__(
        self,
        trie: DeviceTrie,
        groups: int,
        beams: int,
        space: LogprobSpace = "vocabulary",
        forced_chains: ForcedChains = "at_once",
    ) -> None:
        self.trie, self.beams, self.space = trie, beams, space
        self._at_once = forced_chains == "at_once"
        self._free_chains = space == "trie"
        """Whether a beam with one title below it needs no more scores: its tokens all have log-probability 0."""
        self._arrays = TrieArrays.of(trie)
        self._state = Beams.at_root(groups, beams, trie.num_depths, self._carried, self._dtype)
        self._pool = Pool.empty(groups, beams, self._carried, self._dtype)

    def frontier(self) -> Frontier:
        """See TrieSearch."""
        found = look_ahead(self._arrays, self._state, self._at_once, self._free_chains)
        slot, count, parent, fanout, *on_device = found
        node, token = (torch.from_numpy(values).to(self.trie.device, non_blocking=True) for values in on_device)
        return Frontier(slot, count, parent, fanout, node, token)

    def children(self, frontier: Frontier, rows: slice, logits: torch.Tensor) -> Children:
        """See TrieSearch: the 2G most likely."""
        return top_children(self.trie, logits, frontier.node[rows], frontier.fanout[rows], 2 * self.beams, self.space)

    def advance(self, frontier: Frontier, children: Children) -> None:
        """See TrieSearch: every group walks its chains, then its beams compete for one step."""
        trie, state, pool = self._arrays, self._state, self._pool
        found = children.to_host()
        check_finite(found.logprob.numpy())
        walk(trie, state, pool, found.logprob.numpy())
        last = np.cumsum(frontier.count) - 1
        edge, logprob = found.edge.numpy()[last], found.logprob.numpy()[last]
        score = state.score.ravel()[frontier.slot, None] + logprob
        compete(trie, state, pool, 2 * self.beams, score, edge, logprob, np.zeros((*score.shape, 0)))
        if self._free_chains:
            finish_free(trie, state, pool)

    def results(self) -> list[Candidates]:
        """See TrieSearch: fewer than G candidates where the catalogue has fewer titles."""
        pool = self._pool
        tokens, logprobs = trace(self._arrays, self._state, pool, self.trie.source.eos_token)
        groups = []
        for group, found in enumerate((pool.score > -np.inf).sum(1).tolist()):
            length = (pool.depth[group, :found] + 1).tolist()
            groups.append(
                Candidates(
                    tokens=[row[:n] for row, n in zip(tokens[group, :found], length, strict=True)],
                    logprobs=[row[:n] for row, n in zip(logprobs[group, :found], length, strict=True)],
                    item_class=pool.item_class[group, :found],
                    score=pool.score[group, :found].astype(np.float32),
                )
            )
        return groups
