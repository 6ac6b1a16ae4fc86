"""Who sees whom in a packed row, in the forms that attention kernels want."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

MAX_RUN = 96
# Most queries of a run: longer runs compute more that is masked, shorter ones take more calls.
BLOCK = 128
# Queries and keys of one block of flex attention.


@dataclass(frozen=True)
class Run:
    """Queries start:stop of a packed row. They see the key ranges of their ancestors and, by the tree, each other."""

    start: int
    stop: int
    ancestors: tuple[tuple[int, int], ...]

    @cached_property
    def keys(self) -> list[tuple[int, int]]:
        """The ranges of keys that its queries see, in order, neighbours as one."""
        ranges: list[tuple[int, int]] = []
        for start, stop in (*self.ancestors, (self.start, self.stop)):
            joins = bool(ranges) and ranges[-1][1] == start
            ranges[-1:] = [(ranges[-1][0], stop)] if joins else [*ranges[-1:], (start, stop)]
        return ranges


@dataclass(frozen=True)
class MaskedRun:
    """A run of Q queries and the K keys that some of them see, as attention takes them."""

    queries: slice
    """Of the packed row."""
    keys: list[slice]
    """Of the packed row, in order; K keys in all."""
    mask: torch.Tensor
    """float32 [1, Q * sharing, K]: 0 where a query sees a key, else -inf; a query's heads are neighbours."""

    def seen(self, rows: torch.Tensor) -> torch.Tensor:
        """[H, K, D], what the run sees of rows [H, N, D]."""
        parts = [rows[:, keys] for keys in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def add_seen(self, total: torch.Tensor, values: torch.Tensor) -> None:
        """Add values [H, K, D] to the rows of `total` [H, N, D] that they belong to."""
        parts = values.split([keys.stop - keys.start for keys in self.keys], 1)
        for keys, part in zip(self.keys, parts, strict=True):
            total[:, keys] += part


@dataclass
class TreeMask:
    """Who sees whom in a packed row: made once per forward pass, shared by its layers."""

    subtree_end: torch.Tensor
    """int64 [N], of PackedBatch"""
    positions: torch.Tensor
    """int64 [N]"""
    _cache: dict[Any, Any] = field(init=False, default_factory=dict)

    def runs(self, window: int | None, sharing: int) -> list[MaskedRun]:
        """All queries of the row, in order, on the CPU. sharing: query heads for each key head."""
        arguments = window, sharing
        if arguments not in self._cache:
            runs = split_runs(self.subtree_end.tolist())
            self._cache[arguments] = [self._masked(run, window, sharing) for run in runs]
        return self._cache[arguments]

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

    def _masked(self, run: Run, window: int | None, sharing: int) -> MaskedRun:
        query = torch.arange(run.start, run.stop)[:, None]
        key = torch.cat([torch.arange(*keys) for keys in run.keys])
        hidden = ~self._visible(query, key, window)
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")).repeat_interleave(sharing, 0)
        return MaskedRun(slice(run.start, run.stop), [slice(*keys) for keys in run.keys], mask[None])


def split_runs(subtree_end: list[int]) -> list[Run]:
    """Cut a packed row into runs of at most MAX_RUN queries, in order: the small subtrees of a parent together."""
    return list(_split(subtree_end, 0, len(subtree_end), ()))


def _split(subtree_end: list[int], start: int, stop: int, ancestors: tuple[tuple[int, int], ...]) -> Iterator[Run]:
    """Cut the sibling subtrees that fill start:stop, all of them below `ancestors`."""
    root = pending = start
    while root < stop:
        end = subtree_end[root]
        if pending < root and end - pending > MAX_RUN:
            yield Run(pending, root, ancestors)
            pending = root
        if end - root > MAX_RUN:
            branch = root + 1
            while branch < end and subtree_end[branch] == end:
                branch += 1
            yield from _split_chain(root, branch, ancestors)
            yield from _split(subtree_end, branch, end, (*ancestors, (root, branch)))
            pending = end
        root = end
    if pending < stop:
        yield Run(pending, stop, ancestors)


def _split_chain(start: int, stop: int, ancestors: tuple[tuple[int, int], ...]) -> Iterator[Run]:
    """Cut an unbranched chain into equal parts."""
    parts = -(-(stop - start) // MAX_RUN)
    bounds = [start + (stop - start) * part // parts for part in range(parts + 1)]
    for first, last in pairwise(bounds):
        yield Run(first, last, (*ancestors, (start, first)) if first > start else ancestors)


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The key blocks of each query block for flex attention: int32 counts, and indices, the set ones first."""
    indices = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]
