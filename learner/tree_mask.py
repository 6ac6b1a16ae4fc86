"""Who sees whom in a packed row, in the forms that attention kernels want."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

MIN_CHAIN = 64
# Tokens of an unbranched chain from which on it is a run of its own.
MAX_RUN = 128
# Queries up to which neighbouring subtrees are one run: more queries see more that is not theirs, fewer more calls.
BLOCK = 128
# Queries and keys of one block of flex attention.


@dataclass(frozen=True)
class Run:
    """Queries start:stop of a packed row. They see the key ranges of their ancestors and, by the tree, each other."""

    start: int
    stop: int
    ancestors: tuple[tuple[int, int], ...]
    """Each is a run of its own, further up."""
    chain: bool = False
    """Whether every query sees all before it in the run."""

    @cached_property
    def keys(self) -> list[tuple[int, int]]:
        """The ranges of keys that its queries see, in order, neighbours as one."""
        ranges: list[tuple[int, int]] = []
        for start, stop in (*self.ancestors, (self.start, self.stop)):
            joins = bool(ranges) and ranges[-1][1] == start
            ranges[-1:] = [(ranges[-1][0], stop)] if joins else [*ranges[-1:], (start, stop)]
        return ranges


@dataclass
class TreeMask:
    """Who sees whom in a packed row: made once per forward pass, shared by its layers."""

    subtree_end: torch.Tensor
    """int64 [N], of PackedBatch"""
    positions: torch.Tensor
    """int64 [N]"""
    _cache: dict[Any, Any] = field(init=False, default_factory=dict)

    def runs(self, window: int | None, dtype: torch.dtype) -> list[tuple[Run, torch.Tensor | None]]:
        """Runs that cover the row, each with its additive mask [queries, keys of the run], None where it is causal."""
        if (window, dtype) not in self._cache:
            runs = split_runs(self.subtree_end.tolist())
            self._cache[window, dtype] = [(run, self._additive(run, window, dtype)) for run in runs]
        return self._cache[window, dtype]

    def block_mask(self, window: int | None) -> BlockMask:
        """flex attention's blocks: those that nobody sees are never computed. N must be a multiple of BLOCK."""
        if window not in self._cache:
            some, every = self._blocks(window)

            def visible(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                return self._visible(query, key, window)

            size = len(self.subtree_end)
            partial, full = _listed(some & ~every), _listed(every)
            self._cache[window] = BlockMask.from_kv_blocks(
                *partial, *full, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(size, size)
            )
        return self._cache[window]

    def _blocks(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Two bool [N / BLOCK, N / BLOCK], query block by key block: some query may see some key; every sees every.

        Below the diagonal a subtree that ends behind a block's first query, or behind its last, reaches that query.
        """
        end, position = self.subtree_end.view(-1, BLOCK), self.positions.view(-1, BLOCK)
        first = torch.arange(len(end), device=end.device)[:, None] * BLOCK
        below = torch.ones(len(end), len(end), dtype=torch.bool, device=end.device).tril(-1)
        some = below & (end.amax(1) > first)
        every = below & (end.amin(1) >= first + BLOCK)
        if window is not None:
            some &= position.amin(1)[:, None] - position.amax(1) < window
            every &= position.amax(1)[:, None] - position.amin(1) < window
        return some.fill_diagonal_(True), every

    def _visible(self, query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
        visible = (key <= query) & (query < self.subtree_end[key])
        return visible if window is None else visible & (self.positions[query] - self.positions[key] < window)

    def _additive(self, run: Run, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        if run.chain and not run.ancestors and (window is None or run.stop - run.start <= window):
            return None
        queries = torch.arange(run.start, run.stop)
        keys = torch.cat([torch.arange(*keys) for keys in run.keys])
        visible = self._visible(queries[:, None], keys[None, :], window)
        return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))


def split_runs(subtree_end: list[int]) -> list[Run]:
    """Cut a packed row into runs, in order: long chains alone, the small subtrees between them together."""
    runs: list[Run] = []
    _split(subtree_end, 0, len(subtree_end), (), runs)
    return runs


def _split(
    subtree_end: list[int], start: int, stop: int, ancestors: tuple[tuple[int, int], ...], runs: list[Run]
) -> None:
    """Cut the sibling subtrees that fill start:stop, all of them below `ancestors`."""
    root = pending = start
    while root < stop:
        end = subtree_end[root]
        branch = root + 1
        while branch < end and subtree_end[branch] == end:
            branch += 1
        long = branch - root >= MIN_CHAIN or end - root > MAX_RUN
        if pending < root and (long or end - pending > MAX_RUN):
            runs.append(Run(pending, root, ancestors))
            pending = root
        if long:
            runs.append(Run(root, branch, ancestors, chain=True))
            _split(subtree_end, branch, end, (*ancestors, (root, branch)), runs)
            pending = end
        root = end
    if pending < stop:
        runs.append(Run(pending, stop, ancestors))


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The key blocks of each query block for flex attention: int32 counts, and indices, the set ones first."""
    indices = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]
