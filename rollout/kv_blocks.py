"""Which block of the paged KV cache holds which tokens of which beam: planned on the host, in whole arrays."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

ALIGNMENT = 128
"""Tokens that the width of block tables is a multiple of, as vLLM's own runners make them for every kernel."""


class OutOfBlocksError(RuntimeError):
    """More blocks were taken than there are; the caller planned too large a batch."""


class BeamBlocks:
    """Block tables of P groups of G beams, copy-on-write where beams part.

    Beams share the blocks of their common past: the prompt's, with every other prompt that starts alike, and every
    full block of an ancestor. Only the last, partly filled block of a beam with several successors is copied, once for
    each successor after the first.

    >>> blocks = BeamBlocks(prompts, beams=16, num_blocks=1000, block_size=32)
    >>> blocks.extend(slots, counts)                      # room for the next tokens of these beams
    >>> source, destination = blocks.follow(parents)      # beams were replaced: copy these blocks
    """

    def __init__(self, prompts: Sequence[np.ndarray], beams: int, num_blocks: int, block_size: int) -> None:
        """prompts: int32 [L_p] each; their tokens belong to beam 0 of each group. Block 0 stays unused."""
        self.block_size, self.beams, self._num_blocks = block_size, beams, num_blocks
        slots = len(prompts) * beams
        self.length = np.zeros(slots, np.int64)
        """Tokens of each beam that are in the cache, or will be after the next forward pass."""
        self.table = np.zeros((slots, 0), np.int32)
        """The blocks of each beam, from its first token on; 0 behind its last."""
        self._widen(max(int(_columns(len(prompt), block_size)) for prompt in prompts))
        self.shared = np.zeros(len(prompts), np.int64)
        """Leading tokens of each prompt that an earlier prompt computes."""
        taken, known = 0, dict[tuple[int, bytes], int]()
        for group, prompt in enumerate(prompts):
            taken = self._place(group, np.asarray(prompt, np.int32), known, taken)
        if taken >= num_blocks:
            raise OutOfBlocksError(f"{taken} KV-cache blocks are needed, {num_blocks - 1} are free")
        self._free = np.arange(taken + 1, num_blocks, dtype=np.int32)

    def _place(self, group: int, prompt: np.ndarray, known: dict[tuple[int, bytes], int], taken: int) -> int:
        """Give a prompt its blocks; full ones are shared, but never that of the last token, whose output is needed.

        known: the full blocks by that before them and their own tokens. taken: the last block that is; returns it.
        """
        content, width, before = prompt.tobytes(), self.block_size * prompt.itemsize, 0
        shareable, row = (len(prompt) - 1) // self.block_size, []
        for column in range(shareable):
            key = (before, content[column * width : (column + 1) * width])
            before = known.setdefault(key, taken + 1)
            if before > taken:
                taken = before
            else:
                self.shared[group] = (column + 1) * self.block_size
            row.append(before)
        row.append(taken + 1)
        slot = group * self.beams
        self.table[slot, : len(row)], self.length[slot] = row, len(prompt)
        return taken + 1

    def extend(self, slots: np.ndarray, counts: np.ndarray) -> None:
        """Make room for counts[i] more tokens of beam slots[i]."""
        have = _columns(self.length[slots], self.block_size)
        self.length[slots] += counts
        need = _columns(self.length[slots], self.block_size)
        self._widen(int(need.max(initial=0)))
        while (more := have < need).any():
            blocks = self._take(int(more.sum()))
            self.table[slots[more], have[more]] = blocks
            have = have + more

    def follow(self, parents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Replace every beam by its successor: (source, destination) blocks to copy.

        parents: int [P, G], the beam within the group that each new beam extends, -1 for none.
        """
        slots = np.flatnonzero(parents >= 0)
        sources = slots // self.beams * self.beams + parents.ravel()[slots]
        heir = np.empty(len(self.length), np.int64)
        heir[sources[::-1]] = slots[::-1]  # of several, the first
        first = heir[sources] == slots

        old_table, old_length = self.table, self.length
        self.table, self.length = np.zeros_like(old_table), np.zeros_like(old_length)
        self.table[slots], self.length[slots] = old_table[sources], old_length[sources]
        partial = ~first & (self.length[slots] % self.block_size > 0)
        parted, last = slots[partial], self.length[slots[partial]] // self.block_size
        copied = self.table[parted, last].copy()
        self.table[parted, last] = 0

        free = np.ones(self._num_blocks, bool)
        free[0] = free[self.table.ravel()] = False
        self._free = np.flatnonzero(free).astype(np.int32)
        blocks = self._take_neighbours(len(parted))
        self.table[parted, last] = blocks
        return copied, blocks

    def places(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64: the place in the cache of the token at `positions` of beam `slots`, elementwise."""
        blocks = self.table[slots, positions // self.block_size].astype(np.int64)
        return blocks * self.block_size + positions % self.block_size

    def _widen(self, columns: int) -> None:
        if columns > self.table.shape[1]:
            aligned = ALIGNMENT // math.gcd(ALIGNMENT, self.block_size)
            more = int(_columns(columns, aligned)) * aligned - self.table.shape[1]
            self.table = np.pad(self.table, ((0, 0), (0, more)))

    def _take(self, count: int, first: int = 0) -> np.ndarray:
        """Blocks that are free no longer: `count` of them, leaving out the `first` ones."""
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} KV-cache blocks are needed, {len(self._free)} are free")
        taken = self._free[first : first + count]
        self._free = np.delete(self._free, slice(first, first + count)) if first else self._free[count:]
        return taken

    def _take_neighbours(self, count: int) -> np.ndarray:
        """Ascending ones without a gap, which are faster to write, where there are so many; else as `_take`."""
        last = self._free[max(count - 1, 0) :]
        gapless = last - self._free[: len(last)] == count - 1
        return self._take(count, int(gapless.argmax()) if gapless.any() else 0)


def blocks_needed(length: int, beams: int, level_width: np.ndarray, block_size: int) -> int:
    """Most blocks that one group can hold at a time, however far its beams are computed ahead.

    Beams that reach into a column of the block tables are distinct nodes of the trie where they part or later, so a
    column takes at most as many blocks as the trie is wide from there on. length: of the prompt. level_width: int64
    [D], nodes of the trie at each depth.
    """
    full = length // block_size
    column = np.arange(full, max(full + 1, int(_columns(length + len(level_width) - 1, block_size))))
    depth = np.maximum(column * block_size - length + 1, 0)  # of the first node in each column
    widest_from = np.maximum.accumulate(level_width[::-1])[::-1]
    return full + int(np.minimum(beams, widest_from[np.minimum(depth, len(level_width) - 1)]).sum())


def most_blocks_needed(length: int, beams: int, level_width: np.ndarray, block_size: int) -> int:
    """The same of whichever prompt of at most `length` tokens needs most: one that ends just before a block does, so
    that what is generated starts in that block and goes on in another."""
    lengths = range(max(1, length - block_size + 1), length + 1)  # a whole block less needs a block less
    return max(blocks_needed(shorter, beams, level_width, block_size) for shorter in lengths)


def passes(
    start: np.ndarray, stop: np.ndarray, budget: int, max_rows: int
) -> Iterator[tuple[int, int, slice, np.ndarray, np.ndarray]]:
    """Cut N rows of tokens into forward passes of at most `budget` tokens and `max_rows` rows.

    start, stop: int64 [N], positions of each row's tokens. Yields first and last (exclusive) token of a pass in the
    sequence of all tokens, its rows, and start and stop of each row within it.
    """
    after = np.cumsum(stop - start)
    first = 0
    while first < after[-1]:
        top = int(np.searchsorted(after, first, "right"))
        last = int(min(first + budget, after[min(top + max_rows, len(after)) - 1]))
        row = slice(top, int(np.searchsorted(after, last, "left")) + 1)
        offset = stop[row] - after[row]
        yield first, last, row, np.maximum(start[row], first + offset), np.minimum(stop[row], last + offset)
        first = last


def _columns(length: np.ndarray | int, block_size: int) -> np.ndarray:
    return -(-np.asarray(length) // block_size)
