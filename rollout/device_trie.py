"""The title trie on the device that searches, and what it forces."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from catalog.trie import Trie
from rollout.arrays import as_tensor


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
    """int64 [D + 1]: nodes at each depth, and none below."""
    source: Trie

    @classmethod
    def of(cls, trie: Trie, device: torch.device | str = "cpu") -> "DeviceTrie":
        arrays = trie.first_edge, trie.edge_token, trie.edge_target
        first_edge, edge_token, edge_target = (as_tensor(array).to(device, non_blocking=True) for array in arrays)
        return cls(first_edge, edge_token, edge_target, np.diff(trie.level_start, append=trie.num_nodes), trie)

    @property
    def num_depths(self) -> int:
        """Depths at which a group can stand: before each token of the longest title, and behind its last."""
        return len(self.level_width)

    @property
    def device(self) -> torch.device:
        return self.first_edge.device

    def _there(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def fanout(self, node: torch.Tensor) -> torch.Tensor:
        """int64, like node: number of children."""
        return self.first_edge[node + 1] - self.first_edge[node]

    def fanout_after(self, node: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """int64, like node: number of children of the node `steps` forced steps down, at most `chain` of it."""
        return torch.where(steps == self.chain[node], self._chain_fanout[node], 1)

    @cached_property
    def chain(self) -> torch.Tensor:
        """int32 [N]: how many further nodes the trie forces from each node on, the next one that branches included."""
        return self._there(self._chains[0])

    @cached_property
    def forced_to_end(self) -> torch.Tensor:
        """bool [N]: whether but one title lies below a node, so that all of its further tokens are forced."""
        return self._there(self._chains[1])

    @cached_property
    def _chain_fanout(self) -> torch.Tensor:
        """int64 [N]: number of children where the chain from each node ends."""
        return self._there(self._chains[2])

    def down_chains(self, node: torch.Tensor, length: torch.Tensor, longest: int) -> torch.Tensor:
        """int64 [..., longest + 1]: each node, then the `length` nodes that it forces; the last one again behind them.

        node, length: int64 [...]; length is at most `chain` of the node, and at most `longest`.
        """
        if not longest:
            return node[..., None]
        ahead = torch.arange(longest + 1, device=node.device)
        return self._in_chains[self._place[node][..., None] + torch.minimum(ahead, length[..., None])]

    @cached_property
    def _in_chains(self) -> torch.Tensor:
        """int64 [N]: all nodes, chain after chain from its first node to the one that branches or ends."""
        nodes = np.empty_like(self._places)
        nodes[self._places] = np.arange(len(nodes))
        return self._there(nodes)

    @cached_property
    def _place(self) -> torch.Tensor:
        """int64 [N]: where each node lies in `_in_chains`."""
        return self._there(self._places)

    @cached_property
    def _places(self) -> np.ndarray:
        first, target, length = self.source.first_edge, self.source.edge_target, self._chains[0]
        forced = np.zeros(len(length), bool)  # nodes that are their parent's only child
        forced[target[first[np.flatnonzero(length)]]] = True
        place = np.cumsum(np.where(forced, 0, length + 1)) - (length + 1)
        for start, stop in pairwise(self.source.level_start.tolist()):
            single = start + np.flatnonzero(length[start:stop])
            place[target[first[single]]] = place[single] + 1
        return place

    @cached_property
    def _chains(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        first, target = self.source.first_edge, self.source.edge_target
        length, to_end = np.zeros(self.source.num_nodes, np.int32), np.zeros(self.source.num_nodes, bool)
        fanout = np.diff(first)
        starts = self.source.level_start.tolist()
        for start, stop in zip(starts[-2::-1], starts[:0:-1], strict=True):
            single = start + np.flatnonzero(np.diff(first[start : stop + 1]) == 1)
            child = target[first[single]]
            below = np.maximum(child, 0)
            length[single] = np.where(child < 0, 0, 1 + length[below])
            to_end[single] = (child < 0) | to_end[below]
            fanout[single] = np.where(child < 0, 1, fanout[below])
        return length, to_end, fanout
