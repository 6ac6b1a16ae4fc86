"""Tree packing: the tokens that candidates and prompts share are fed once.

The sequences prompt + candidate of a micro-batch form a trie. Its inner nodes are the packed tokens, in depth-first
order, so that every subtree is a contiguous range and one integer per token, the end of its subtree, says who may
attend to it: query q sees key k exactly when k <= q < subtree_end[k]. Leaves are never fed: they are only targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch


@dataclass(frozen=True)
class PackedBatch:
    """The C candidates of some groups, group by group in rank order, as tokens to feed and places to read.

    The log-probability of token t of candidate c is that of `edge_target[edge[c, t]]` after the fed token
    `rows[edge_row[edge[c, t]]]`.
    """

    tokens: torch.Tensor
    """int64 [B, N]: what is fed. B is 1 for tree packing and C for the padded batch."""
    positions: torch.Tensor
    """int64 [B, N]: position of each token in its own sequence."""
    subtree_end: torch.Tensor | None
    """int64 [N]: one past the last descendant of each packed token; None for the padded batch."""
    attention_mask: torch.Tensor | None
    """int64 [B, N]: 1 for tokens, 0 for padding; None for tree packing."""
    rows: torch.Tensor
    """int64 [K]: the fed tokens that have a target, ascending indices into the flattened [B * N]."""
    edge_row: torch.Tensor
    """int64 [E]: the distinct (fed token, target) pairs: ascending indices into `rows`."""
    edge_target: torch.Tensor
    """int64 [E]: the target token of each pair."""
    row_edges: np.ndarray
    """int64 [K + 1], on the host on any device: the pairs of rows[k] are row_edges[k] : row_edges[k + 1]."""
    edge: torch.Tensor
    """int64 [C, T]: the pair of every candidate token; 0 where mask is False."""
    mask: torch.Tensor
    """bool [C, T]: True for the tokens of a candidate, end-of-sequence included."""
    fed_tokens: int
    """Tokens of the sequences that the model computes, without padding."""
    choices: "Choices | None" = None
    """Where log-probabilities are over the title trie."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return _moved(self, device)


@dataclass(frozen=True)
class Choices:
    """The distinct choices of a batch between several allowed tokens; a token that is forced has log-probability 0."""

    row: torch.Tensor
    """int64 [P]: index into the batch's `rows`, per allowed token."""
    token: torch.Tensor
    """int64 [P]: the allowed tokens, choice by choice."""
    choice: torch.Tensor
    """int64 [P]: which choice an allowed token belongs to."""
    chosen: torch.Tensor
    """int64 [choices]: index of the allowed token that was chosen."""
    index: torch.Tensor
    """int64 [C, T]: the choice of every candidate token, -1 where forced or masked."""

    def to(self, device: torch.device | str) -> Self:
        """The same choices on another device."""
        return _moved(self, device)


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor of the host on the learner's device; nobody waits until it is there.

    A GPU copies out of pinned memory, which torch gives to nobody else before the copy is done.
    """
    on_gpu = torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor.to(device)


def _moved(record: Any, device: torch.device | str) -> Any:
    """A dataclass of the host with all of its tensors, and those of a record in it, on another device."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    tensors = {name: to_device(value, device) for name, value in values.items() if isinstance(value, torch.Tensor)}
    records = {name: value.to(device) for name, value in values.items() if isinstance(value, Choices)}
    return replace(record, **tensors, **records)


@dataclass(frozen=True)
class _PrefixTree:
    """The trie of some sequences; nodes are numbered depth first."""

    token: np.ndarray
    """int64 [nodes]"""
    depth: np.ndarray
    """int64 [nodes]: index of the node's token in its sequence."""
    parent: np.ndarray
    """int64 [nodes], -1 for a first token."""
    subtree_end: np.ndarray
    """int64 [nodes]: one past the node's last descendant."""
    node: np.ndarray
    """int64 [C, L]: the node of every token of every sequence; meaningless behind a sequence's end."""

    @property
    def inner(self) -> np.ndarray:
        """bool [nodes]: nodes with a child."""
        inner = np.zeros(len(self.token), bool)
        inner[self.parent[self.parent >= 0]] = True
        return inner


def pack_groups(
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[Sequence[int]]],
    rounded: Callable[[int], int] = lambda tokens: tokens,
) -> PackedBatch:
    """Several groups in one packed row; what their prompts share is fed once, too.

    prompts: token ids, one prompt per group, not empty. candidates[group][rank]: token ids, end-of-sequence included,
    not empty. `rounded` says how long a row of so many tokens is to be, so that compiled code meets few lengths.
    Raises ValueError naming the group of an empty prompt or candidate.
    """
    sequences, first_target = _sequences(prompts, candidates)
    tree = _prefix_tree(sequences)
    inner = tree.inner
    fed_before = np.concatenate([[0], np.cumsum(inner)])  # fed tokens among the nodes before each node
    fed = int(fed_before[-1])
    padding = rounded(fed) - fed

    at_target, mask = _targets(sequences, first_target)
    targets, edge = np.unique(np.take_along_axis(tree.node, at_target, 1)[mask], return_inverse=True)
    by_row = np.argsort(tree.parent[targets], kind="stable")
    targets, edge = targets[by_row], np.argsort(by_row)[edge]
    rows, edge_row = np.unique(fed_before[tree.parent[targets]], return_inverse=True)
    return PackedBatch(
        tokens=_tensor(np.pad(tree.token[inner], (0, padding)))[None],
        positions=_tensor(np.pad(tree.depth[inner], (0, padding)))[None],
        subtree_end=_tensor(np.concatenate([fed_before[tree.subtree_end[inner]], fed + 1 + np.arange(padding)])),
        attention_mask=None,
        rows=_tensor(rows),
        edge_row=_tensor(edge_row),
        edge_target=_tensor(tree.token[targets]),
        row_edges=np.searchsorted(edge_row, np.arange(len(rows) + 1)),
        edge=_scatter(edge, mask),
        mask=torch.from_numpy(mask),
        fed_tokens=fed,
    )


def padded_batch(prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]]) -> PackedBatch:
    """One right-padded row per candidate: the oracle of tree packing, and the way for models that refuse it.

    Arguments and errors are those of `pack_groups`. The last token of a candidate is not fed.
    """
    sequences, first_target = _sequences(prompts, candidates)
    fed = np.asarray([len(sequence) - 1 for sequence in sequences])
    width = int(fed.max())
    tokens = np.stack([np.pad(sequence[:-1], (0, width - len(sequence) + 1)) for sequence in sequences])
    at_target, mask = _targets(sequences, first_target)
    rows = (at_target - 1 + width * np.arange(len(sequences))[:, None])[mask]
    targets = [sequence[first:] for sequence, first in zip(sequences, first_target, strict=True)]
    return PackedBatch(
        tokens=_tensor(tokens),
        positions=_tensor(np.tile(np.arange(width), (len(tokens), 1))),
        subtree_end=None,
        attention_mask=_tensor((np.arange(width) < fed[:, None]).astype(np.int64)),
        rows=_tensor(rows),
        edge_row=torch.arange(len(rows)),
        edge_target=_tensor(np.concatenate(targets)),
        row_edges=np.arange(len(rows) + 1),
        edge=_scatter(np.arange(len(rows)), mask),
        mask=torch.from_numpy(mask),
        fed_tokens=int(fed.sum()),
    )


def packed_tokens(prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    """Tokens that each group costs when it is packed alone: its prompt, and what its candidates share but once.

    Arguments and errors are those of `pack_groups`.
    """
    _check(prompts, candidates)
    trees = [_prefix_tree([np.asarray(candidate, np.int64) for candidate in ranked]) for ranked in candidates]
    return [len(prompt) + int(tree.inner.sum()) for prompt, tree in zip(prompts, trees, strict=True)]


def _check(prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]]) -> None:
    for group, (prompt, ranked) in enumerate(zip(prompts, candidates, strict=True)):
        if not len(prompt):
            raise ValueError(f"group {group} has an empty prompt: nothing predicts its candidates' first tokens")
        if not len(ranked):
            raise ValueError(f"group {group} has no candidates to pack")
        for rank, candidate in enumerate(ranked):
            if not len(candidate):
                raise ValueError(f"group {group}: candidate {rank} has no tokens")


def _sequences(
    prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]]
) -> tuple[list[np.ndarray], np.ndarray]:
    """prompt + candidate of every candidate, and the index of its first target, int64 [C]."""
    if not len(prompts):
        raise ValueError("there are no groups to pack")
    _check(prompts, candidates)
    sequences, first_target = [], []
    for prompt, ranked in zip(prompts, candidates, strict=True):
        for candidate in ranked:
            sequences.append(np.concatenate([np.asarray(prompt, np.int64), np.asarray(candidate, np.int64)]))
            first_target.append(len(prompt))
    return sequences, np.asarray(first_target)


def _prefix_tree(sequences: Sequence[np.ndarray]) -> _PrefixTree:
    """Sorted sequences visit their trie depth first: each adds the nodes below what it shares with the one before."""
    order = sorted(range(len(sequences)), key=lambda row: sequences[row].astype(">u4").tobytes())
    lengths = np.asarray([len(sequences[row]) for row in order])
    depth = np.arange(lengths.max())
    table = np.full((len(order), len(depth)), -1)
    table[depth < lengths[:, None]] = np.concatenate([sequences[row] for row in order])

    same = (table[1:] == table[:-1]) & (table[1:] >= 0)
    shared = np.concatenate([[0], np.logical_and.accumulate(same, axis=1).sum(axis=1)])
    new = (depth >= shared[:, None]) & (depth < lengths[:, None])
    number = (np.cumsum(new) - 1).reshape(new.shape)
    node = np.maximum.accumulate(np.where(new, number, -1), axis=0)
    parent = np.pad(node[:, :-1], ((0, 0), (1, 0)), constant_values=-1)

    total = int(new.sum())
    first_new = np.cumsum(new.sum(axis=1)) - new.sum(axis=1)
    closes = np.where(depth >= shared[:, None], first_new[:, None], total)  # a sequence ends the subtrees it leaves
    end = np.minimum.accumulate(np.concatenate([closes[1:], np.full_like(closes[:1], total)])[::-1], axis=0)[::-1]

    unsorted = np.empty_like(node)
    unsorted[order] = node
    return _PrefixTree(table[new], np.broadcast_to(depth, new.shape)[new], parent[new], end[new], unsorted)


def _targets(sequences: Sequence[np.ndarray], first_target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index in its sequence of every candidate token, int64 [C, T] (0 behind the end), and the mask, bool [C, T]."""
    sizes = np.asarray([len(sequence) for sequence in sequences]) - first_target
    offsets = np.arange(sizes.max())
    mask = offsets < sizes[:, None]
    return np.where(mask, first_target[:, None] + offsets, 0), mask


def _scatter(values: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    scattered = np.zeros(mask.shape, np.int64)
    scattered[mask] = values
    return torch.from_numpy(scattered)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.int64))
