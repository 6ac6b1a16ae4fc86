"""How far the beams of a group can go before one of them comes to a choice."""

from dataclasses import dataclass

import torch

from rollout.device_trie import DeviceTrie


@dataclass(frozen=True)
class Chains:
    """Of every beam [P, G]: its own node and the `length` nodes behind it that it will come to, whatever they score.

    While no running beam of a group stands where the trie branches, the beams do not compete: none can drop out but by
    a full pool. So the nodes up to the next branch can be scored together, and hardly one of them in vain.
    """

    node: torch.Tensor
    """int64 [P, G, K + 1]: its own, then those behind it; meaningless behind `length`."""
    edge: torch.Tensor
    """int64 [P, G, K + 1]: the first edge of each node, up to the last the only one."""
    length: torch.Tensor
    """int64 [P, G]: at most K."""
    ends: torch.Tensor
    """bool [P, G]: whether its title ends there, before another beam of the group comes to a choice."""
    any_ends: bool
    """Whether any does."""

    @classmethod
    def of(cls, trie: DeviceTrie, node: torch.Tensor, wanted: torch.Tensor) -> "Chains":
        """Arguments as `reach`; waits for the device, to know K and whether a title ends."""
        length, ends = reach(trie, node, wanted)
        longest, any_ends = torch.stack([length.max(), ends.any().to(length.dtype)]).tolist()
        return cls.walked(trie, node, length, ends, longest, bool(any_ends))

    @classmethod
    def walked(
        cls,
        trie: DeviceTrie,
        node: torch.Tensor,
        length: torch.Tensor,
        ends: torch.Tensor,
        longest: int,
        any_ends: bool,
    ) -> "Chains":
        """From what `reach` says; longest: of all lengths."""
        nodes = trie.down_chains(node.clamp_min(0), length, longest)
        return cls(nodes, trie.first_edge[nodes], length, ends, any_ends)

    def last(self, values: torch.Tensor) -> torch.Tensor:
        """[P, G] of values [P, G, K + 1], at the last node of each chain."""
        return values.gather(2, self.length[..., None])[..., 0]

    @property
    def steps(self) -> torch.Tensor:
        """bool [P, G, K]: which steps each beam takes; it has `length` of them."""
        return torch.arange(self.node.shape[2] - 1, device=self.node.device) < self.length[..., None]


def reach(trie: DeviceTrie, node: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`length` and `ends` of Chains.

    node: int64 [P, G], -1 where no beam is running. wanted: bool [P], groups whose beams may go ahead.
    """
    running, start = node >= 0, node.clamp_min(0)
    chain, to_end = trie.chain[start].long(), trie.forced_to_end[start]
    choice = torch.where(running & ~to_end, chain, trie.num_depths).amin(1, keepdim=True)
    goes = running & wanted[:, None]
    return torch.where(goes, torch.minimum(chain, choice), 0), goes & to_end & (chain < choice)
