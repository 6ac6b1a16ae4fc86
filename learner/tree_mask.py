"""Who sees whom in a packed row, in the forms that attention kernels want."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

RUN = 96
# Queries of a run: longer runs compute more that is masked, shorter ones take more calls.
KEYS_STEP = 32
# Keys of a run are a multiple of it where the machine compiles code for every shape and the row is long enough.
BLOCK = 128
# Queries and keys of one block of flex attention.


@dataclass(frozen=True)
class MaskedRun:
    """A run of Q queries and K keys that hold all that they see, as attention takes them."""

    queries: slice
    """Of the packed row."""
    keys: list[slice]
    """Of the packed row; K keys in all."""
    mask: torch.Tensor
    """float32 [1, Q * sharing, K]: 0 where a query sees a key, else -inf; a query's heads are neighbours."""
    has_target: bool
    """Whether one of the queries is among TreeMask.rows."""

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
    rows: torch.Tensor | None = None
    """int64 [K], of PackedBatch: the tokens whose hidden states are wanted; None for all."""
    only_rows: bool = False
    """Whether attention may leave out queries that are not among `rows`."""
    _cache: dict[Any, Any] = field(default_factory=dict)

    def of_rows(self) -> "TreeMask":
        """The same, with `only_rows`."""
        return replace(self, only_rows=True)  # which shares the cache

    def runs(self, window: int | None, sharing: int, rounded: bool = False) -> list[MaskedRun]:
        """The queries of the row, in order, on the CPU; with `only_rows`, no runs without any of these.

        sharing: query heads for each key head. rounded: keys are as KEYS_STEP says.
        """
        arguments = window, sharing, rounded
        if arguments not in self._cache:
            self._cache[arguments] = list(self._all_runs(window, sharing, rounded))
        runs = self._cache[arguments]
        return [run for run in runs if run.has_target] if self.only_rows else runs

    def block_mask(self, window: int | None) -> BlockMask:
        """flex attention's blocks: those that nobody sees are never computed. N must be a multiple of BLOCK."""
        if window not in self._cache:
            some, every = self._blocks(window)

            def visible(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                return _visible(query, key, self.subtree_end, self.positions, window)

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

    def _all_runs(self, window: int | None, sharing: int, rounded: bool) -> Iterator[MaskedRun]:
        """Of the tokens before a run, which is cut out of the row anywhere, it sees the ancestors of its first one.

        In numpy, whose calls take less time than torch's, and small models have many short runs.
        """
        end, position, size = self.subtree_end.numpy(), self.positions.numpy(), len(self.subtree_end)
        with_target = None if self.rows is None else {*np.unique(self.rows.numpy() // RUN).tolist()}
        for start in range(0, size, RUN):
            query = np.arange(start, min(start + RUN, size))
            key = np.concatenate([np.flatnonzero(end[:start] > start), query])
            hidden = ~_visible(query[:, None], key, end, position, window)
            if window is not None:
                used = ~hidden.all(0)
                key, hidden = key[used], hidden[:, used]
            keys = _ranges(key)
            if rounded and (missing := min(-len(key) % KEYS_STEP, size)):
                keys, hidden = [*keys, slice(0, missing)], np.pad(hidden, ((0, 0), (0, missing)), constant_values=True)
            mask = torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0)).repeat(sharing, 0))
            has_target = with_target is None or start // RUN in with_target
            yield MaskedRun(slice(start, start + len(query)), keys, mask[None], has_target)


def _visible(query: Any, key: Any, subtree_end: Any, positions: Any, window: int | None) -> Any:
    """bool: whether tokens see others, by their places in the row; all tensors, or all numpy arrays."""
    visible = (key <= query) & (query < subtree_end[key])
    return visible if window is None else visible & (positions[query] - positions[key] < window)


def _ranges(indices: np.ndarray) -> list[slice]:
    """The runs of neighbours in ascending indices [K]."""
    ends = np.flatnonzero(np.diff(indices) != 1) + 1
    return [slice(int(part[0]), int(part[-1]) + 1) for part in np.split(indices, ends)]


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The key blocks of each query block for flex attention: int32 counts, and indices, the set ones first."""
    indices = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]
