"""Packed batches read back by brute force: every candidate token must see exactly its own prefix."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from learner.packing import PackedBatch, pack_groups, packed_tokens, padded_batch
from learner.products import rounded_rows
from learner.tree_mask import BLOCK, KEYS_STEP, RUN, SCORES, RunBatch, TreeMask

Groups = list[tuple[list[int], list[list[int]]]]

tokens = st.integers(0, 3)  # few tokens, so that prefixes, duplicates and whole prompts coincide
groups_of_tokens = st.lists(
    st.tuples(
        st.lists(tokens, min_size=1, max_size=8),
        st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=4,
)


def split(groups: Groups) -> tuple[list[list[int]], list[list[list[int]]]]:
    return [prompt for prompt, _ in groups], [candidates for _, candidates in groups]


def visible(batch: PackedBatch) -> np.ndarray:
    """bool [N, N] of a packed row, from subtree_end."""
    index = np.arange(batch.tokens.shape[1])
    return (index <= index[:, None]) & (index[:, None] < batch.subtree_end.numpy())


def prefix_seen(batch: PackedBatch, candidate: int, step: int) -> list[int]:
    """The tokens that the row of a candidate's token attends to, in the order of their positions."""
    row, column = divmod(int(batch.rows[batch.edge_row[batch.edge[candidate, step]]]), batch.tokens.shape[1])
    if batch.subtree_end is None:
        seen = np.arange(column + 1)
        assert batch.attention_mask[row, : column + 1].all()
    else:
        seen = np.flatnonzero(visible(batch)[column])
    assert batch.positions[row, seen].tolist() == list(range(len(seen)))
    return batch.tokens[row, seen].tolist()


@given(groups_of_tokens)
def test_every_token_is_predicted_from_exactly_its_prefix(groups: Groups) -> None:
    for batch in (pack_groups(*split(groups)), padded_batch(*split(groups))):
        paths = [(prompt, candidate) for prompt, candidates in groups for candidate in candidates]
        assert batch.mask.sum(1).tolist() == [len(candidate) for _, candidate in paths]
        for index, (prompt, candidate) in enumerate(paths):
            for step, token in enumerate(candidate):
                assert batch.edge_target[batch.edge[index, step]] == token
                assert prefix_seen(batch, index, step) == prompt + candidate[:step]


@given(groups_of_tokens)
def test_no_prefix_is_fed_twice_and_no_leaf_is_fed(groups: Groups) -> None:
    fed = {
        tuple((prompt + candidate)[:end])
        for prompt, candidates in groups
        for candidate in candidates
        for end in range(1, len(prompt + candidate))
    }
    assert pack_groups(*split(groups)).fed_tokens == len(fed)


@given(groups_of_tokens)
def test_pairs_are_distinct_and_ordered(groups: Groups) -> None:
    batch = pack_groups(*split(groups))
    pairs = list(zip(batch.edge_row.tolist(), batch.edge_target.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert batch.edge_row.tolist() == sorted(batch.edge_row.tolist())
    assert batch.rows.tolist() == sorted(set(batch.rows.tolist()))


@given(groups_of_tokens)
def test_the_count_of_a_group_is_what_it_costs_alone(groups: Groups) -> None:
    for prompt, candidates in groups:
        assert packed_tokens([prompt], [candidates]) == [pack_groups([prompt], [candidates]).fed_tokens]


@given(groups_of_tokens, st.integers(1, 9))
def test_padding_sees_only_itself(groups: Groups, padding: int) -> None:
    batch, exact = pack_groups(*split(groups), lambda tokens: tokens + padding), pack_groups(*split(groups))
    size = exact.fed_tokens
    assert batch.fed_tokens == size
    assert batch.tokens.shape == (1, size + padding)
    padded = visible(batch)
    assert np.array_equal(padded[:size, :size], visible(exact))
    assert not padded[:size, size:].any()
    assert np.array_equal(padded[size:], np.eye(size + padding, dtype=bool)[size:])


def whole_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK


def large_groups(seed: int, template_tokens: int = 80) -> Groups:
    """Prompts of a shared template with long and short tails, candidates that branch at different depths."""
    random = np.random.default_rng(seed)
    template = random.integers(0, 50, template_tokens).tolist()
    groups = []
    for tail in (100, 3, 150, 70):
        titles = random.integers(0, 50, (5, 30)).tolist()
        candidates = [[*titles[random.integers(5)][: random.integers(1, 30)], 60, rank] for rank in range(16)]
        groups.append((template + random.integers(0, 50, tail).tolist(), candidates))
    return groups


def shown(batches: Sequence[RunBatch], size: int, heads: int, key_heads: int) -> torch.Tensor:
    """bool [N, N]: what each query sees over all runs, every head alike; a query must be in exactly one of them."""
    found = torch.zeros(size, size, dtype=torch.bool)
    covered: list[int] = []
    for batch in batches:
        runs, queries, keys = batch.mask.shape[0], batch.mask.shape[2], batch.mask.shape[4]
        own = batch.of_queries(tokens_and_heads(size, heads)).view(runs, key_heads, queries, -1, 2)
        seen = batch.of_keys(tokens_and_heads(size, key_heads)).view(runs, key_heads, keys, 2)
        assert torch.equal(own[..., 1], torch.arange(heads).view(key_heads, 1, -1).expand_as(own[..., 1]))
        assert torch.equal(seen[..., 1], torch.arange(key_heads)[:, None].expand_as(seen[..., 1]))
        assert torch.equal(own[..., 0], own[:, :1, :, :1, 0].expand_as(own[..., 0]))
        assert torch.equal(seen[..., 0], seen[:, :1, :, 0].expand_as(seen[..., 0]))
        for query, key, sees in zip(own[:, 0, :, 0, 0], seen[:, 0, :, 0], batch.mask[:, 0, :, 0] == 0, strict=True):
            used = key[sees.any(0)]  # others are only there for a common or a round number
            assert len(used.unique()) == len(used)
            for place, of_place in zip(query, sees, strict=True):
                found[place, key[of_place]] = True
            covered += query.tolist()
    assert sorted(covered) == list(range(size))
    return found


def tokens_and_heads(size: int, heads: int) -> torch.Tensor:
    """Rows [N * H, 2] that say whose they are."""
    return torch.cartesian_prod(torch.arange(size), torch.arange(heads))


@pytest.mark.parametrize("window", [None, 7, 100])
def test_runs_cover_the_row_once_and_show_each_query_what_it_may_see(window: int | None) -> None:
    batch = pack_groups(*split(large_groups(0)))
    distance = batch.positions[0][:, None] - batch.positions[0][None, :]
    expected = torch.from_numpy(visible(batch)) & (distance < (window or 10**9))
    runs = TreeMask(batch.subtree_end, batch.positions[0]).runs(window, 6, 3)
    assert torch.equal(shown(runs, batch.fed_tokens, 6, 3), expected)
    assert sum(len(run.mask) for run in runs) > len(large_groups(0))


@given(groups_of_tokens)
def test_runs_of_any_tree_see_what_they_may(groups: Groups) -> None:
    batch = pack_groups(*split(groups))
    runs = TreeMask(batch.subtree_end, batch.positions[0]).runs(None, 1, 1)
    assert np.array_equal(shown(runs, batch.fed_tokens, 1, 1).numpy(), visible(batch))


def test_runs_see_few_keys_that_are_masked() -> None:
    batch = pack_groups(*split(large_groups(1)))
    runs = TreeMask(batch.subtree_end, batch.positions[0]).runs(None, 1, 1)
    assert sum(run.mask.numel() for run in runs) < 2 * visible(batch).sum()


def test_runs_of_a_batch_are_no_more_than_the_cache_holds() -> None:
    batch = pack_groups(*split(large_groups(1)))
    of_many, of_few = (TreeMask(batch.subtree_end, batch.positions[0]).runs(None, heads, 2) for heads in (64, 4))
    assert len(of_many) > len(of_few)
    assert all(len(run.mask) == 1 or 64 * run.mask.numel() <= SCORES for run in of_many)


@pytest.mark.parametrize("window", [None, 7, 150])
def test_flex_attention_computes_the_blocks_that_somebody_sees_and_masks_within(window: int | None) -> None:
    batch = pack_groups(*split(large_groups(2, template_tokens=300)), whole_blocks)
    size = batch.tokens.shape[1]
    blocks = TreeMask(batch.subtree_end, batch.positions[0]).block_mask(window)
    distance = batch.positions[0][:, None] - batch.positions[0][None, :]
    expected = torch.from_numpy(visible(batch)) & (distance < (window or 10**9))
    assert torch.equal(create_mask(blocks.mask_mod, None, None, size, size, "cpu")[0, 0], expected)

    per_block = expected.view(size // BLOCK, BLOCK, size // BLOCK, BLOCK).transpose(1, 2).flatten(2)
    computed = blocks.to_dense()[0, 0].bool()
    unmasked = dense_blocks(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not (dense_blocks(blocks.kv_num_blocks, blocks.kv_indices) & unmasked).any()  # else computed twice
    assert not (per_block.any(2) & ~computed).any()
    assert not (unmasked & ~per_block.all(2)).any()
    if window is None:
        assert torch.equal(computed, per_block.any(2))
        assert torch.equal(unmasked, per_block.all(2))
        assert unmasked.any()
    assert computed.sum() < computed.numel() / 2


def dense_blocks(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    dense = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, (count, listed) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        dense[row, listed[:count].long()] = True
    return dense


def test_a_subtree_that_ends_with_a_block_is_not_computed_for_the_next() -> None:
    ends = torch.tensor([BLOCK] * BLOCK + [2 * BLOCK] * BLOCK)
    blocks = TreeMask(ends, torch.arange(2 * BLOCK) % BLOCK).block_mask(None)
    assert blocks.kv_num_blocks.flatten().tolist() == [1, 1]
    assert blocks.full_kv_num_blocks is not None
    assert blocks.full_kv_num_blocks.flatten().tolist() == [0, 0]


@pytest.mark.parametrize("pack", [pack_groups, padded_batch, packed_tokens])
def test_empty_input_is_refused_by_name(pack: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="group 1 has an empty prompt"):
        pack([[1], []], [[[2]], [[3]]])
    with pytest.raises(ValueError, match="group 0: candidate 1 has no tokens"):
        pack([[1]], [[[2], []]])
    with pytest.raises(ValueError, match="group 1 has no candidates"):
        pack([[1], [1]], [[[2]], []])


def test_nothing_is_not_packed() -> None:
    for pack in (pack_groups, padded_batch):
        with pytest.raises(ValueError, match="no groups"):
            pack([], [])


def random_tree(seed: int, nodes: int) -> list[int]:
    """subtree_end of a random tree of long chains and bushes, in depth-first order."""
    draw = np.random.default_rng(seed)
    path: list[int] = []
    ends = [nodes] * nodes
    for node in range(nodes):
        if path and draw.random() < 0.1:
            kept = int(draw.integers(0, len(path) + 1))
            for left in path[kept:]:
                ends[left] = node
            path = path[:kept]
        path.append(node)
    return ends


@given(st.integers(0, 10**6), st.integers(1, 600), st.sampled_from([None, 1, 7, 100]), st.booleans())
def test_runs_show_each_query_of_any_tree_what_it_may_see(
    seed: int, nodes: int, window: int | None, rounded: bool
) -> None:
    ends = torch.tensor(random_tree(seed, nodes))
    index = torch.arange(nodes)
    positions = ((index[:, None] > index) & (index[:, None] < ends)).sum(1)
    runs = TreeMask(ends, positions).runs(window, 2, 1, rounded)
    sees = (index <= index[:, None]) & (index[:, None] < ends)
    if window is not None:
        sees &= positions[:, None] - positions < window
    assert torch.equal(shown(runs, nodes, 2, 1), sees)
    for run in runs:
        count, keys = run.mask.shape[0], run.mask.shape[4]
        most = int((run.mask == 0).any(2).sum(-1).max())  # that one of the runs uses
        assert keys == (-(-most // KEYS_STEP) * KEYS_STEP if rounded else most)
        assert not rounded or count & count - 1 == 0


def test_padding_of_padded_rows_is_neither_fed_nor_seen() -> None:
    batch = padded_batch([[1, 2], [3]], [[[4], [4, 5, 6]], [[7, 8]]])
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.fed_tokens == 2 + 4 + 2


def test_layers_with_different_windows_get_masks_of_their_own() -> None:
    mask = TreeMask(torch.full((9,), 9), torch.arange(9))
    whole, windowed = (mask.runs(window, 1, 1)[0].mask for window in (None, 4))
    assert torch.isfinite(whole).sum(4).flatten().tolist() == list(range(1, 10))
    assert torch.isfinite(windowed).sum(4).flatten().tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4]


def test_few_shapes_are_compiled_for_runs_of_many_rows() -> None:
    shapes = set()
    for seed in range(40):
        batch = pack_groups(*split(large_groups(seed)), rounded_rows)
        runs = TreeMask(batch.subtree_end, batch.positions[0]).runs(None, 8, 2, True)
        shapes |= {(run.mask.shape[0], run.mask.shape[2], run.mask.shape[4]) for run in runs}
    assert len(shapes) <= 3 * 500 / KEYS_STEP
    assert {count for count, _, _ in shapes} <= {1, 2, 4, 8, 16}
    assert {queries for _, queries, _ in shapes} <= set(range(16, RUN + 1, 16))
