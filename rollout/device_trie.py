"""The title trie on the device that searches, and what it forces."""

from dataclasses import dataclass
from functools import cached_property

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

    def fanout(self, node: torch.Tensor) -> torch.Tensor:
        """int64, like node: number of children."""
        return self.first_edge[node + 1] - self.first_edge[node]

    @cached_property
    def forced(self) -> tuple[np.ndarray, np.ndarray]:
        """On the host: chain and forced_to_end of TrieArrays."""
        first, target = self.source.first_edge, self.source.edge_target
        chain, to_end = np.zeros(self.source.num_nodes, np.int32), np.zeros(self.source.num_nodes, bool)
        starts = self.source.level_start.tolist()
        for start, stop in zip(starts[-2::-1], starts[:0:-1], strict=True):
            single = start + np.flatnonzero(np.diff(first[start : stop + 1]) == 1)
            child = target[first[single]]
            below = np.maximum(child, 0)
            chain[single] = np.where(child < 0, 0, 1 + chain[below])
            to_end[single] = (child < 0) | to_end[below]
        return chain, to_end
