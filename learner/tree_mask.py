"""Who sees whom in a packed row, in the forms that attention kernels want."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

RUN = 64
# Queries of a run: longer runs compute more that is masked, shorter ones look at their keys more often.
KEYS_STEP = 32
# Keys of a run are a multiple of it where the machine compiles code for every shape.
SCORES = 1 << 19
# Of a batch of runs, at most: so many that calls take little of the time, so few that they stay in the cache.
KEPT = 1 << 24
# Attention weights of all layers that are kept for the backward pass, at most: 64 MiB.
BLOCK = 128
# Queries and keys of one block of flex attention.


@dataclass(frozen=True)
class RunBatch:
    """R runs of Q queries and K keys each that hold all that they see: R * H_kv matrices of the packed row.

    They are taken from rows [N * H, D] and [N * H_kv, D], in which the heads of a token are neighbours.
    """

    queries: torch.Tensor
    """int64 [R * H_kv * Q * sharing]: the places of the matrices' rows, matrix after matrix."""
    keys: torch.Tensor
    """int64 [R * H_kv * K]: likewise."""
    mask: torch.Tensor
    """float32 [R, 1, Q, 1, K]: 0 where a query sees a key, else -inf; scores are [R, H_kv, Q, sharing, K]."""
    sharing: int
    """Query heads of a key head."""
    has_target: bool
    """Whether every run has a query that is among TreeMask.rows; else none has."""

    def of_queries(self, rows: torch.Tensor) -> torch.Tensor:
        """[R * H_kv, Q * sharing, D] of rows [N * H, D]."""
        return rows.index_select(0, self.queries).view(-1, self.mask.shape[2] * self.sharing, rows.shape[1])

    def of_keys(self, rows: torch.Tensor) -> torch.Tensor:
        """[R * H_kv, K, D] of rows [N * H_kv, D]."""
        return rows.index_select(0, self.keys).view(-1, self.mask.shape[4], rows.shape[1])


@dataclass(frozen=True)
class _Run:
    query: np.ndarray
    """int64 [Q], of the packed row."""
    key: np.ndarray
    """int64 [K]: what they see."""
    has_target: bool


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
    _spare: list[int] = field(default_factory=lambda: [KEPT])

    def of_rows(self) -> "TreeMask":
        """The same, with `only_rows`."""
        return replace(self, only_rows=True)  # which shares the cache, and what may be kept

    def reserve(self, weights: int) -> bool:
        """Whether so many attention weights may be kept beside those that are; a negative number gives some back."""
        fits = weights <= self._spare[0]
        self._spare[0] -= weights if fits else 0
        return fits

    def runs(self, window: int | None, heads: int, key_heads: int, rounded: bool = False) -> list[RunBatch]:
        """All queries of the row, each in one run, on the CPU; with `only_rows`, no runs without any of these.

        rounded: keys are as KEYS_STEP says, and the number of runs is a power of two.
        """
        arguments = window, heads, key_heads, rounded
        if arguments not in self._cache:
            self._cache[arguments] = list(self._batches(window, heads, key_heads, rounded))
        batches = self._cache[arguments]
        return [batch for batch in batches if batch.has_target] if self.only_rows else batches

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

    def _batches(self, window: int | None, heads: int, key_heads: int, rounded: bool) -> Iterator[RunBatch]:
        """Runs of about as many keys together, those with a target apart from those without."""
        alike: dict[tuple[int, bool], list[_Run]] = {}
        for run in self._runs(window):
            alike.setdefault((len(run.query), run.has_target), []).append(run)
        for (queries, _), runs in alike.items():
            runs.sort(key=lambda run: len(run.key), reverse=True)
            while runs:
                keys = len(runs[0].key)
                keys += -keys % KEYS_STEP if rounded else 0
                count = min(len(runs), max(1, SCORES // (heads * queries * keys)))
                count = 1 << count.bit_length() - 1 if rounded else count
                yield self._batch(runs[:count], keys, window, heads, key_heads)
                runs = runs[count:]

    def _runs(self, window: int | None) -> Iterator[_Run]:
        """Cut out of the row anywhere: of the tokens before it, a run sees the ancestors of its first one.

        In numpy, whose calls take less time than torch's, and small models have many short runs.
        """
        end, position, size = self.subtree_end.numpy(), self.positions.numpy(), len(self.subtree_end)
        with_target = None if self.rows is None else {*np.unique(self.rows.numpy() // RUN).tolist()}
        for start in range(0, size, RUN):
            query = np.arange(start, min(start + RUN, size))
            key = np.concatenate([np.flatnonzero(end[:start] > start), query])
            if window is not None:
                key = key[_visible(query[:, None], key, end, position, window).any(0)]
            yield _Run(query, key, with_target is None or start // RUN in with_target)

    def _batch(self, runs: Sequence[_Run], keys: int, window: int | None, heads: int, key_heads: int) -> RunBatch:
        """keys: of every run; those that one lacks are the row's first token, masked."""
        end, position = self.subtree_end.numpy(), self.positions.numpy()
        query = np.stack([run.query for run in runs])
        there = np.arange(keys) < np.array([len(run.key) for run in runs])[:, None]
        key = np.zeros(there.shape, np.int64)
        key[there] = np.concatenate([run.key for run in runs])
        visible = _visible(query[:, :, None], key[:, None], end, position, window) & there[:, None]
        mask = np.where(visible, np.float32(0), np.float32(-np.inf))[:, None, :, None]
        head, key_head = np.arange(heads).reshape(key_heads, 1, -1), np.arange(key_heads)[:, None]
        of_queries, of_keys = query[:, None, :, None] * heads + head, key[:, None] * key_heads + key_head
        places = torch.from_numpy(of_queries.ravel()), torch.from_numpy(of_keys.ravel())
        return RunBatch(*places, torch.from_numpy(mask), heads // key_heads, runs[0].has_target)


def _visible(query: Any, key: Any, subtree_end: Any, positions: Any, window: int | None) -> Any:
    """bool: whether tokens see others, by their places in the row; all tensors, or all numpy arrays."""
    visible = (key <= query) & (query < subtree_end[key])
    return visible if window is None else visible & (positions[query] - positions[key] < window)


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The key blocks of each query block for flex attention: int32 counts, and indices, the set ones first."""
    indices = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]
