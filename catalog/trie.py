"""The trie of title tokens: one object for the mask, the search, the packing and the statistics."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from catalog.errors import CatalogError
from catalog.ragged import Ragged

PADDING = -1
"""Where a title has ended; no token."""


class TrieError(CatalogError):
    """Titles that make no trie, or a damaged trie file."""


@dataclass(frozen=True)
class Trie:
    """A trie in compressed sparse rows. Node 0 is the root; nodes are numbered level by level.

    Edges of node n are first_edge[n] : first_edge[n + 1], sorted by token. Every title ends with an edge that carries
    the end-of-sequence token and leads to no node; its target is -1 - item_class.

    >>> trie = Trie.from_titles([[5, 6, eos], [5, 7, eos]], eos_token=eos, tokenizer_fingerprint="...")
    >>> tokens, targets = trie.children(0)
    >>> trie.save(path); trie = Trie.load(path)        # memory-mapped
    """

    first_edge: np.ndarray
    """int64 [N + 1]"""
    edge_token: np.ndarray
    """int32 [E]"""
    edge_target: np.ndarray
    """int32 [E]: the child node, or -1 - item_class at end-of-sequence."""
    level_start: np.ndarray
    """int64 [D + 1]: nodes of depth d are level_start[d] : level_start[d + 1]."""
    eos_token: int
    tokenizer_fingerprint: str

    @classmethod
    def from_titles(
        cls, titles: Ragged | Sequence[Sequence[int]], *, eos_token: int, tokenizer_fingerprint: str
    ) -> "Trie":
        """titles[c]: the tokens of item class c, end-of-sequence last and nowhere else; all different.

        Raises TrieError naming the item class of an empty, duplicate or badly ended title.
        """
        titles = titles if isinstance(titles, Ragged) else Ragged.from_lists(titles)
        if not len(titles):
            raise TrieError("a trie needs at least one title")
        flat, start = titles.flat, titles.start[:-1]
        _check_ends(flat, start, titles.lengths, eos_token)

        vocabulary = int(flat.max()) + 1
        parent = np.zeros(len(titles), np.int64)  # node that each title has reached, within its level
        alive = np.arange(len(titles))
        fanout, tokens, targets, level_start = [], [], [], [0, 1]
        depth, width = 0, 1
        while len(alive):
            token = flat[start[alive] + depth]
            edges, first, edge_of = np.unique(parent * vocabulary + token, return_index=True, return_inverse=True)
            ends = edges % vocabulary == eos_token
            _check_distinct(alive, edge_of, ends)
            child = np.cumsum(~ends) - 1
            fanout.append(np.bincount(edges // vocabulary, minlength=width))
            tokens.append(edges % vocabulary)
            targets.append(np.where(ends, -1 - alive[first], level_start[-1] + child))
            parent, alive = child[edge_of][~ends[edge_of]], alive[~ends[edge_of]]
            depth, width = depth + 1, int((~ends).sum())
            if width:
                level_start.append(level_start[-1] + width)
        return cls(
            first_edge=np.concatenate([[0], np.cumsum(np.concatenate(fanout))]),
            edge_token=np.concatenate(tokens).astype(np.int32),
            edge_target=np.concatenate(targets).astype(np.int32),
            level_start=np.asarray(level_start, np.int64),
            eos_token=eos_token,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )

    @property
    def num_nodes(self) -> int:
        return len(self.first_edge) - 1

    @property
    def num_classes(self) -> int:
        return int((self.edge_target < 0).sum())

    @property
    def max_tokens(self) -> int:
        """Length of the longest title, end-of-sequence included."""
        return len(self.level_start) - 1

    @cached_property
    def fanout_by_depth(self) -> np.ndarray:
        """int64 [D]: the largest number of children at each depth."""
        return np.maximum.reduceat(np.diff(self.first_edge), self.level_start[:-1])

    @cached_property
    def _parent_edge(self) -> np.ndarray:
        """int64 [N]: the edge that leads to each node; -1 for the root."""
        inner = np.flatnonzero(self.edge_target >= 0)
        parent_edge = np.full(self.num_nodes, -1, np.int64)
        parent_edge[self.edge_target[inner]] = inner
        return parent_edge

    @cached_property
    def _class_edge(self) -> np.ndarray:
        """int64 [classes]: the end-of-sequence edge of each item class."""
        leaves = np.flatnonzero(self.edge_target < 0)
        class_edge = np.empty(len(leaves), np.int64)
        class_edge[-1 - self.edge_target[leaves]] = leaves
        return class_edge

    def children(self, node: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets) of the edges of `node`."""
        edges = slice(self.first_edge[node], self.first_edge[node + 1])
        return self.edge_token[edges], self.edge_target[edges]

    def step(self, node: int, token: int) -> int | None:
        """Where `token` leads from `node`: a node, -1 - item_class at end-of-sequence, or None when not allowed."""
        tokens, targets = self.children(node)
        edge = int(np.searchsorted(tokens, token))
        return int(targets[edge]) if edge < len(tokens) and tokens[edge] == token else None

    def classify(self, tokens: Sequence[int]) -> int:
        """The item class whose title is `tokens` (end-of-sequence included), or -1."""
        node: int | None = 0
        for token in tokens:
            if node is None or node < 0:
                return -1
            node = self.step(node, token)
        return -1 - node if node is not None and node < 0 else -1

    def path(self, node: int) -> list[int]:
        """Tokens from the root to `node`."""
        tokens = []
        while node:
            edge = self._parent_edge[node]
            tokens.append(int(self.edge_token[edge]))
            node = int(np.searchsorted(self.first_edge, edge, side="right")) - 1
        return tokens[::-1]

    def title_tokens(self, item_class: int) -> list[int]:
        """Tokens of an item class, end-of-sequence last. Raises IndexError for one that is not there, as -1."""
        if item_class < 0:
            raise IndexError(f"there is no item class {item_class}")
        edge = self._class_edge[item_class]
        return [*self.path(int(np.searchsorted(self.first_edge, edge, side="right")) - 1), self.eos_token]

    def titles(self, item_classes: np.ndarray) -> Ragged:
        """`title_tokens` of many item classes (int [n]) at once."""
        edge = self._class_edge[item_classes]
        levels, alive = [np.full(len(edge), self.eos_token, np.int32)], np.ones(len(edge), bool)
        while alive.any():
            node = np.searchsorted(self.first_edge, edge, side="right") - 1
            alive = node > 0
            edge = np.where(alive, self._parent_edge[node], edge)
            levels.append(np.where(alive, self.edge_token[edge], PADDING).astype(np.int32))
        rows = np.stack(levels[::-1], axis=1)
        return Ragged.from_lengths(rows[rows != PADDING], (rows != PADDING).sum(1))

    @property
    def longest_title(self) -> int:
        """An item class whose title has max_tokens tokens."""
        deepest = self.edge_target[self.first_edge[self.level_start[-2]] :]
        return int(-1 - deepest[deepest < 0][0])

    def save(self, path: Path) -> None:
        """One uncompressed Arrow row of four lists, so that `load` maps it without copying."""
        names = ("first_edge", "edge_token", "edge_target", "level_start")
        columns = [
            pa.array([getattr(self, name)], pa.large_list(pa.from_numpy_dtype(getattr(self, name).dtype)))
            for name in names
        ]
        metadata = {"eos_token": str(self.eos_token), "tokenizer_fingerprint": self.tokenizer_fingerprint}
        batch = pa.RecordBatch.from_arrays(columns, names=list(names)).replace_schema_metadata(metadata)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)

    @classmethod
    def load(cls, path: Path) -> "Trie":
        """Map a saved trie. Raises TrieError naming a file that is missing or damaged."""
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
            metadata = batch.schema.metadata
            arrays = {name: batch.column(name).values.to_numpy(zero_copy_only=True) for name in batch.schema.names}
            trie = cls(
                **arrays,
                eos_token=int(metadata[b"eos_token"]),
                tokenizer_fingerprint=metadata[b"tokenizer_fingerprint"].decode(),
            )
            edges, nodes = len(trie.edge_token), trie.num_nodes
            if (len(trie.edge_target), int(trie.first_edge[-1]), int(trie.level_start[-1])) != (edges, edges, nodes):
                raise ValueError("its arrays do not belong together")
            return trie
        except (OSError, pa.ArrowException, ValueError, AttributeError, KeyError, TypeError) as error:
            raise TrieError(
                f"{path}: not a readable trie ({error}); delete {path.parent} and build the catalogue again"
            ) from error


def _check_ends(flat: np.ndarray, start: np.ndarray, lengths: np.ndarray, eos_token: int) -> None:
    if (lengths < 2).any():
        raise TrieError(f"item class {int(np.argmin(lengths))}: the title has no tokens")
    ends = np.zeros(len(flat), bool)
    ends[start + lengths - 1] = True
    wrong = np.flatnonzero((flat == eos_token) != ends)
    if len(wrong):
        item_class = int(np.searchsorted(start, wrong[0], side="right")) - 1
        raise TrieError(f"item class {item_class}: end-of-sequence ({eos_token}) must be its last token and no other")


def _check_distinct(alive: np.ndarray, edge_of: np.ndarray, ends: np.ndarray) -> None:
    counts = np.bincount(edge_of, minlength=len(ends))
    twice = np.flatnonzero(ends & (counts > 1))
    if len(twice):
        first, second = alive[edge_of == twice[0]][:2]
        raise TrieError(f"item classes {first} and {second} have the same tokens")
