"""Block tables: every beam reads exactly its own past, and no block is lost or given twice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search_oracle import random_trie

from rollout.config import ForcedChains
from rollout.device_trie import DeviceTrie
from rollout.kv_blocks import BeamBlocks, OutOfBlocksError, blocks_needed, most_blocks_needed, passes
from rollout.search import BeamSearch


class Cache:
    """A cache that remembers what was written where."""

    def __init__(self, blocks: int, size: int) -> None:
        self.tokens, self.size = np.full(blocks * size, -1), size

    def copy(self, source: np.ndarray, destination: np.ndarray) -> None:
        pages = self.tokens.reshape(-1, self.size)
        pages[destination] = pages[source]

    def read(self, blocks: BeamBlocks, slot: int) -> list[int]:
        position = np.arange(blocks.length[slot])
        return self.tokens[blocks.places(np.full(len(position), slot), position)].tolist()


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 5), beams=st.integers(1, 9), size=st.sampled_from([2, 4, 16]))
def test_every_beam_reads_its_own_past(seed: int, groups: int, beams: int, size: int) -> None:
    draw = np.random.default_rng(seed)
    common = draw.integers(0, 9, 12)
    prompts = [
        np.concatenate([common[: draw.integers(0, 12)], draw.integers(0, 9, draw.integers(1, 20))]).astype(np.int32)
        for _ in range(groups)
    ]
    cache = Cache(2000, size)
    blocks = BeamBlocks(prompts, beams, 2000, size)
    for group, prompt in enumerate(prompts):
        position = np.arange(blocks.shared[group], len(prompt))
        cache.tokens[blocks.places(np.full(len(position), group * beams), position)] = prompt[position]
    past = {group * beams: prompt.tolist() for group, prompt in enumerate(prompts)}
    for _ in range(8):
        alive = [[b for b in range(beams) if group * beams + b in past] for group in range(groups)]
        parents = np.full((groups, beams), -1)
        for group in range(groups):
            for beam in range(beams):
                if alive[group] and draw.random() < 0.8:
                    parents[group, beam] = draw.choice(alive[group])
        source, destination = blocks.follow(parents)
        assert not set(source) & set(destination)
        cache.copy(source, destination)
        past = {
            group * beams + beam: list(past[group * beams + parents[group, beam]])
            for group in range(groups)
            for beam in range(beams)
            if parents[group, beam] >= 0
        }
        grow = np.array([slot for slot in past if draw.random() < 0.7], np.int64)
        count = draw.integers(1, 6, len(grow))
        start = blocks.length[grow]
        blocks.extend(grow, count)
        for slot, first, more in zip(grow, start, count, strict=True):
            new = draw.integers(10, 99, more)
            position = np.arange(first, first + more)
            cache.tokens[blocks.places(np.full(more, slot), position)] = new
            past[slot] += new.tolist()
        for slot, tokens in past.items():
            assert cache.read(blocks, slot) == tokens
        assert blocks.table.shape[1] * size % 128 == 0
        held = np.unique(blocks.table)
        assert len(held[held > 0]) + len(np.unique(blocks._free)) == 1999
        assert not np.isin(blocks._free, held).any()


def test_equal_beginnings_are_computed_once() -> None:
    prompt = np.arange(20, dtype=np.int32)
    blocks = BeamBlocks([prompt, prompt, prompt[:9], np.append(prompt[:8], 99).astype(np.int32)], 2, 50, 4)
    assert blocks.shared.tolist() == [0, 16, 8, 8]
    assert blocks.table[0, :4].tolist() == blocks.table[2, :4].tolist()
    assert blocks.table[0, 4] != blocks.table[2, 4]


def test_equal_blocks_behind_another_beginning_are_not_shared() -> None:
    prompt = np.arange(20, dtype=np.int32)
    blocks = BeamBlocks([prompt, np.append(99, prompt[1:]).astype(np.int32)], 1, 50, 4)
    assert blocks.shared.tolist() == [0, 0]
    assert not np.isin(blocks.table[1, :5], blocks.table[0, :5]).any()


def test_a_beam_that_does_not_part_is_not_copied() -> None:
    blocks = BeamBlocks([np.arange(5, dtype=np.int32)], 3, 50, 4)
    source, _ = blocks.follow(np.array([[0, 0, 0]]))
    assert len(source) == 2
    blocks.extend(np.arange(3), np.ones(3, np.int64))
    source, _ = blocks.follow(np.array([[2, 0, 1]]))
    assert len(source) == 0


@pytest.mark.parametrize(("num_blocks", "expected"), [(12, [6, 7]), (7, [2, 4])])
def test_copies_go_to_neighbouring_blocks_where_there_are_such(num_blocks: int, expected: list[int]) -> None:
    blocks = BeamBlocks([np.arange(5, dtype=np.int32)], 4, num_blocks, 4)
    _, written = blocks.follow(np.array([[0, 0, 0, 0]]))
    assert written.tolist() == [3, 4, 5]
    _, written = blocks.follow(np.array([[1, 1, 3, 3]]))  # gives back 2 and 4
    assert written.tolist() == expected


def test_too_few_blocks_is_an_error() -> None:
    with pytest.raises(OutOfBlocksError, match="are free"):
        BeamBlocks([np.arange(40, dtype=np.int32)], 2, 5, 4)
    blocks = BeamBlocks([np.arange(5, dtype=np.int32)], 4, 5, 4)
    with pytest.raises(OutOfBlocksError, match="3 KV-cache blocks are needed, 2 are free"):
        blocks.follow(np.array([[0, 0, 0, 0]]))


@given(
    seed=st.integers(0, 10**6),
    titles=st.integers(1, 40),
    length=st.integers(1, 30),
    beams=st.sampled_from([1, 2, 5, 16]),
    forced_chains=st.sampled_from(["at_once", "token_by_token"]),
    block_size=st.sampled_from([1, 4, 16]),
)
def test_a_search_never_needs_more_than_was_planned(
    seed: int, titles: int, length: int, beams: int, forced_chains: ForcedChains, block_size: int
) -> None:
    trie = DeviceTrie.of(random_trie(seed, titles, 8, 14))
    logits = torch.randn(trie.source.num_nodes, 8, generator=torch.Generator().manual_seed(seed))
    need = blocks_needed(length, beams, trie.level_width, block_size)
    blocks = BeamBlocks([np.zeros(length, np.int32)], beams, need + 1, block_size)
    search = BeamSearch(trie, 1, beams, forced_chains=forced_chains)
    frontier = search.frontier()
    while frontier.size:
        search.advance(frontier, search.children(frontier, slice(None), logits[frontier.node]))
        frontier = search.frontier()
        blocks.follow(frontier.parent)
        blocks.extend(frontier.slot, frontier.count)  # raises OutOfBlocksError


@given(
    length=st.integers(1, 80),
    beams=st.integers(1, 20),
    width=st.lists(st.integers(1, 30), min_size=1, max_size=30),
    block_size=st.sampled_from([1, 4, 16]),
)
def test_a_cache_that_takes_a_prompt_takes_all_shorter_ones(
    length: int, beams: int, width: list[int], block_size: int
) -> None:
    level_width = np.array(width)
    needs = [blocks_needed(shorter, beams, level_width, block_size) for shorter in range(1, length + 1)]
    assert most_blocks_needed(length, beams, level_width, block_size) == max(needs)


def test_little_more_is_planned_than_a_search_can_need() -> None:
    width = np.array([1, 2, 500, 400, 300, *[200] * 20, *[3] * 70])
    assert blocks_needed(250, 16, width, 32) <= 7 + 2 * 16 + 3 * 3


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    offset=st.integers(0, 9),
    budget=st.integers(1, 40),
    max_rows=st.integers(1, 10),
)
def test_passes_cover_every_token_once_within_the_budget(
    counts: list[int], offset: int, budget: int, max_rows: int
) -> None:
    start = np.arange(len(counts)) + offset
    stop = start + np.array(counts)
    seen = []
    for first, last, rows, begin, end in passes(start, stop, budget, max_rows):
        assert last - first == (end - begin).sum() <= budget
        assert len(begin) <= max_rows
        index = np.arange(len(counts))[rows]
        seen += [(i, p) for i, b, e in zip(index, begin, end, strict=True) for p in range(b, e)]
    assert seen == [(i, p) for i in range(len(counts)) for p in range(start[i], stop[i])]
