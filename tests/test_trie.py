"""The trie against a dict of dicts, on random titles with shared prefixes and titles that are prefixes of others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.ragged import Ragged
from catalog.statistics import trie_stats
from catalog.trie import Trie, TrieError

EOS = 7
SETS_OF_TITLES = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=6).map(tuple), min_size=1, unique=True)


def trie_of(titles: list) -> Trie:
    return Trie.from_titles([[*title, EOS] for title in titles], eos_token=EOS, tokenizer_fingerprint="t")


def nested(titles: list) -> dict:
    """The oracle: token -> dict, end-of-sequence -> item class."""
    root: dict = {}
    for item_class, title in enumerate(titles):
        node = root
        for token in title:
            node = node.setdefault(token, {})
        node[EOS] = item_class
    return root


def walk(trie: Trie, node: int) -> dict:
    tokens, targets = trie.children(node)
    return {
        token: -1 - target if target < 0 else walk(trie, target)
        for token, target in zip(tokens.tolist(), targets.tolist(), strict=True)
    }


@given(SETS_OF_TITLES)
def test_trie_holds_exactly_the_titles(titles: list) -> None:
    trie = trie_of(titles)
    assert walk(trie, 0) == nested(titles)
    assert trie.num_classes == len(titles)
    assert trie.max_tokens == max(map(len, titles)) + 1
    for item_class, title in enumerate(titles):
        assert trie.title_tokens(item_class) == [*title, EOS]
        assert trie.classify([*title, EOS]) == item_class


@given(SETS_OF_TITLES, st.lists(st.integers(0, 9), max_size=8))
def test_only_titles_are_classified(titles: list, tokens: list[int]) -> None:
    whole = {(*title, EOS): item_class for item_class, title in enumerate(titles)}
    trie = trie_of(titles)
    assert trie.classify(tokens) == whole.get(tuple(tokens), -1)
    assert [trie.classify([*title, EOS, EOS]) for title in titles] == [-1] * len(titles)


@given(SETS_OF_TITLES)
def test_nodes_are_numbered_by_level_and_know_their_path(titles: list) -> None:
    trie = trie_of(titles)
    prefixes = {title[:depth] for title in titles for depth in range(len(title) + 1)}
    paths = [tuple(trie.path(node)) for node in range(trie.num_nodes)]
    assert set(paths) == prefixes
    assert len(paths) == len(prefixes)
    for depth, (first, end) in enumerate(zip(trie.level_start[:-1], trie.level_start[1:], strict=True)):
        assert {len(path) for path in paths[first:end]} == {depth}


@given(SETS_OF_TITLES)
def test_statistics_count_children(titles: list) -> None:
    trie = trie_of(titles)
    prefixes = {title[:depth] for title in titles for depth in range(len(title) + 1)}
    continuations = {(*title, EOS)[: depth + 1] for title in titles for depth in range(len(title) + 1)}
    children = {prefix: sum(c[:-1] == prefix for c in continuations) for prefix in prefixes}
    by_depth = [[n for prefix, n in children.items() if len(prefix) == d] for d in range(trie.max_tokens)]
    stats = trie_stats(trie)
    assert stats["nodes"] == len(prefixes)
    assert stats["depth"] == len(by_depth)
    assert stats["mean_branching"] == pytest.approx([np.mean(counts) for counts in by_depth], abs=1e-3)
    assert stats["max_branching"] == [max(counts) for counts in by_depth] == trie.fanout_by_depth.tolist()


@given(SETS_OF_TITLES)
def test_saved_trie_is_the_same(tmp_path_factory: pytest.TempPathFactory, titles: list) -> None:
    trie = trie_of(titles)
    assert (trie.edge_token.dtype, trie.edge_target.dtype) == (np.int32, np.int32)
    path = tmp_path_factory.mktemp("trie") / "trie.arrow"
    trie.save(path)
    loaded = Trie.load(path)
    for name in ("first_edge", "edge_token", "edge_target", "level_start"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(trie, name))
        assert getattr(loaded, name).dtype == getattr(trie, name).dtype
    assert (loaded.eos_token, loaded.tokenizer_fingerprint) == (EOS, "t")


def test_loading_maps_the_file_instead_of_copying_it(tmp_path: Path) -> None:
    trie_of([(1, 2), (1, 3)]).save(tmp_path / "trie.arrow")
    assert not Trie.load(tmp_path / "trie.arrow").edge_token.flags.owndata
    assert not Trie.load(tmp_path / "trie.arrow").edge_token.flags.writeable


def test_flat_and_listed_titles_make_the_same_trie() -> None:
    listed = [[1, 2, EOS], [1, EOS], [4, 4, 4, EOS]]
    flat = Trie.from_titles(Ragged.from_lists(listed), eos_token=EOS, tokenizer_fingerprint="t")
    assert walk(flat, 0) == nested([(1, 2), (1,), (4, 4, 4)])


@pytest.mark.parametrize(
    ("titles", "message"),
    [
        ([], "at least one title"),
        ([[1, EOS], [EOS]], "item class 1: the title has no tokens"),
        ([[1, EOS], [2, 3]], "item class 1: end-of-sequence"),
        ([[1, EOS], [2, EOS, 3, EOS]], "item class 1: end-of-sequence"),
        ([[1, EOS], [EOS, 2, EOS]], "item class 1: end-of-sequence"),
        ([[1, 2, EOS], [3, EOS], [1, 2, EOS]], "item classes 0 and 2 have the same tokens"),
    ],
)
def test_bad_titles_are_named(titles: list, message: str) -> None:
    with pytest.raises(TrieError, match=message):
        Trie.from_titles(titles, eos_token=EOS, tokenizer_fingerprint="t")


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trie.arrow"
    with pytest.raises(TrieError, match=r"trie\.arrow"):
        Trie.load(path)
    trie_of([(1, 2), (3,)]).save(path)
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"x" * len(whole)):
        path.write_bytes(damage)
        with pytest.raises(TrieError, match=r"trie\.arrow"):
            Trie.load(path)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"title": ["Bolt"]}),
        pa.table({"first_edge": [[0, 1]]}),
        pa.table({"first_edge": [[0, 1]]}).replace_schema_metadata({"eos_token": "7"}),
        pa.table({"first_edge": [[0, 1]]}).replace_schema_metadata({"eos_token": "seven"}),
        pa.table({"first_edge": pa.array([], pa.list_(pa.int64()))}),
    ],
)
def test_an_arrow_file_of_another_kind_is_named(tmp_path: Path, table: pa.Table) -> None:
    path = tmp_path / "trie.arrow"
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(TrieError, match=rf"trie\.arrow: not a readable trie .*delete {tmp_path} and build"):
        Trie.load(path)


def test_arrays_of_several_tries_are_noticed(tmp_path: Path) -> None:
    path, other = tmp_path / "trie.arrow", trie_of([(1, 2), (3,)])
    for name in ("first_edge", "edge_target", "level_start"):
        replace(trie_of([(1, 2)]), **{name: getattr(other, name)}).save(path)
        with pytest.raises(TrieError, match=rf"trie\.arrow: not a readable trie .*delete {tmp_path} and build"):
            Trie.load(path)


def test_an_item_class_that_is_none_has_no_title() -> None:
    with pytest.raises(IndexError, match="no item class -1"):
        trie_of([(1, 2), (3,)]).title_tokens(-1)


@given(SETS_OF_TITLES)
def test_the_tokens_of_many_titles_are_those_of_each(titles: list) -> None:
    trie = trie_of(titles)
    asked = np.array([*range(len(titles)), 0])
    found = trie.titles(asked)
    assert [found[i].tolist() for i in range(len(asked))] == [trie.title_tokens(int(c)) for c in asked]
    assert len(trie.titles(asked[:0])) == 0
    assert len(trie.title_tokens(trie.longest_title)) == trie.max_tokens
