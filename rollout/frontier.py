"""What every search over the trie shares: what it asks of a model, and how it is driven."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from rollout.children import Children
from rollout.groups import Candidates


@dataclass(frozen=True)
class Frontier:
    """What must be scored next: R beams, each at T_r successive nodes of a forced chain, T in all.

    Arrays are on the host, tensors on the device.
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


class TrieSearch(Protocol):
    """A search that is driven from outside: it says what must be scored, is given the logits, and moves on.

    >>> while (frontier := search.frontier()).size:
    ...     logits = model(frontier.token, ...)                       # [T, V]
    ...     search.advance(frontier, search.children(frontier, slice(None), logits))
    >>> groups = search.results()
    """

    beams: int
    """Of every group: beam b of group g has the slot g * beams + b."""

    def frontier(self) -> Frontier:
        """What must be scored now; empty when every group is done. This or `advance` waits for the device, once."""
        ...

    def children(self, frontier: Frontier, rows: slice, logits: torch.Tensor) -> Children:
        """From the logits [r, V] of some of the frontier's nodes, what `advance` needs of them."""
        ...

    def advance(self, frontier: Frontier, children: Children) -> None:
        """Take the children of all of the frontier's nodes, and move on."""
        ...

    def results(self) -> list[Candidates]:
        """The candidates of every group, best first; complete once the frontier is empty.

        Raises LogitsError where logits that it was given are not finite.
        """
        ...
