"""What beams know beyond their node: scores of a forced chain that were computed at once."""

import torch

from rollout.children import NEG_INF, Children, DeviceTrie
from rollout.frontier import Frontier


class Known:
    """Of every beam [P, G]: log-probabilities of forced tokens to come, then the children at the end of the chain."""

    def __init__(self, trie: DeviceTrie, groups: int, beams: int, lookahead: int) -> None:
        shape, device = (groups, beams), trie.device
        self._trie, self._lookahead = trie, lookahead
        self.scored = torch.zeros(shape, dtype=torch.bool, device=device)
        """bool [P, G]: whether the children of the beam's node are known."""
        self._forced = torch.zeros((*shape, lookahead - 1), device=device)
        self._forced_left = torch.zeros(shape, dtype=torch.int64, device=device)
        self._children: Children | None = None

    def learn(self, frontier: Frontier, children: Children) -> None:
        """Take the children of the frontier's T nodes: [T, W]."""
        device = self.scored.device
        slot = torch.from_numpy(frontier.slot).to(device, non_blocking=True)
        count = torch.from_numpy(frontier.count).to(device, non_blocking=True)
        last = count.cumsum(0) - 1
        self._children = self._with_rows(slot, children.select(last))
        self.scored.view(-1)[slot] = True
        if self._lookahead > 1:
            ahead = torch.arange(self._lookahead - 1, device=device)
            place = (last - count + 1)[:, None] + torch.minimum(ahead, count[:, None] - 1)
            self._forced.view(-1, self._lookahead - 1)[slot] = children.logprob[place, 0]
            self._forced_left.view(-1)[slot] = count - 1

    def _with_rows(self, slot: torch.Tensor, rows: Children) -> Children:
        """All beams' children [P, G, W], those of beams `slot` replaced."""
        old, width = self._children, rows.logprob.shape[1]
        kept_width = max(width, old.logprob.shape[2]) if old and self._lookahead > 1 else width

        def spread(name: str, otherwise: float) -> torch.Tensor:
            new = getattr(rows, name)
            whole = new.new_full((*self.scored.shape, kept_width), otherwise)
            if old is not None and self._lookahead > 1:
                before = getattr(old, name)
                whole[..., : before.shape[2]] = before
                whole.view(-1, kept_width)[slot] = otherwise
            whole.view(-1, kept_width)[slot, :width] = new
            return whole

        return Children(spread("logprob", NEG_INF), spread("edge", 0), spread("key", NEG_INF))

    def next(self, node: torch.Tensor) -> Children:
        """Children [P, G, W] of every beam's node [P, G]; -inf where a beam is not running (node -1)."""
        assert self._children is not None
        running = (node >= 0)[..., None]
        found = self._children
        if self._lookahead > 1:
            edge = self._trie.first_edge[node.clamp_min(0)]
            found = found.only_child(self._forced_left > 0, edge, self._forced[..., 0])
        return Children(
            torch.where(running, found.logprob, NEG_INF), found.edge, torch.where(running, found.key, NEG_INF)
        )

    def follow(self, ready: torch.Tensor, parent: torch.Tensor) -> None:
        """Beams [P, G] of the ready groups went one token on from `parent`; the others stay as they are."""
        change = ready[:, None]
        if self._lookahead == 1:
            self.scored = self.scored & ~change
            return
        assert self._children is not None
        kept = torch.where(change, parent, torch.arange(parent.shape[1], device=parent.device))
        left = self._forced_left.gather(1, kept) - change.long()
        self.scored = self.scored.gather(1, kept) & ((left >= 0) | ~change)
        self._forced_left = left.clamp_min(0)
        forced = self._forced.gather(1, kept[..., None].expand_as(self._forced))
        self._forced = torch.where(change[..., None], torch.nn.functional.pad(forced[..., 1:], (0, 1)), forced)
        wide = kept[..., None].expand_as(self._children.edge)
        self._children = Children(
            self._children.logprob.gather(1, wide),
            self._children.edge.gather(1, wide),
            self._children.key.gather(1, wide),
        )
