"""Built catalogues: what is in them, when they are built again, and that nothing half-built is ever seen."""

import json
import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catalog.arrow_files import read_arrow
from catalog.build import TOKENIZERS, build_catalog, catalog_texts
from catalog.byte_bpe import train_byte_bpe
from catalog.catalog import Catalog
from catalog.config import DataConfig, GeneratedConfig, TemplateConfig
from catalog.errors import CatalogError
from catalog.interactions import SPLITS
from catalog.tokenizer import PARALLEL, load_tokenizer
from catalog.trie import Trie

SMALL = GeneratedConfig(items=60, users=60, duplicates=0.1, seed=1)
TITLES = ["Acme Bolt", "Acme Nut", "Acme Bolt", "Acme Bolt, Pack of 2"]


def config(cache: Path, **changes: object) -> DataConfig:
    return replace(DataConfig(cache=str(cache), generated=SMALL, max_prompt_tokens=4000), **changes)


def write_folder(folder: Path, titles: list[str]) -> Path:
    folder.mkdir()
    pq.write_table(pa.table({"item_id": [7, 8, 9, 5], "title": titles}), folder / "items.parquet")
    for split in SPLITS:
        columns = {"user_id": ["ann", "bob"], "history": [[7], [9, 8]], "target": [9, 5], "timestamp": [1, 2]}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Catalog:
    return build_catalog(config(tmp_path_factory.mktemp("cache")), str(tiny_tokenizer_dir))


def test_examples_of_a_folder_are_as_written(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    folder = write_folder(tmp_path / "data", TITLES)
    catalog = build_catalog(config(tmp_path / "cache", path=str(folder)), str(tiny_tokenizer_dir))
    assert [catalog.title(c) for c in range(catalog.num_classes)] == ["Acme Bolt", "Acme Nut", "Acme Bolt, Pack of 2"]
    assert [catalog.item_ids_of_class(c) for c in range(3)] == [[7, 9], [8], [5]]
    examples = catalog.examples("valid")
    assert (len(examples), examples.user_id(1)) == (2, "bob")
    assert read_arrow(catalog.path / "valid.arrow", "timestamp").column("timestamp").to_pylist() == [1, 2]
    assert examples.history_classes(1).tolist() == [0, 1]
    assert examples.target_item.tolist() == [2, 3]
    assert examples.target_class.tolist() == [0, 2]
    assert examples.best_rank is None
    text = load_tokenizer(catalog.tokenizer_path).decode(examples.prompt_tokens(1))
    assert text == TemplateConfig().prompt.replace("{history}", '"Acme Bolt",\t"Acme Nut"')


def test_every_prompt_and_title_is_its_text(built: Catalog) -> None:
    tokenizer = load_tokenizer(built.tokenizer_path)
    for item_class in range(built.num_classes):
        tokens = built.trie.title_tokens(item_class)
        assert tokens[-1] == built.eos_token == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[:-1]) == f'"{built.title(item_class)}"\n'
        assert built.trie.classify(tokens) == item_class
    for split in SPLITS:
        examples = built.examples(split)
        for i in range(0, len(examples), 7):
            shown = ",\t".join(f'"{built.title(c)}"' for c in examples.history_classes(i))
            prompt = TemplateConfig().prompt.replace("{history}", shown)
            assert tokenizer.encode(prompt) == examples.prompt_tokens(i).tolist()
            answer = built.trie.title_tokens(examples.target_class[i])[:-1]
            whole = tokenizer.encode(prompt + f'"{built.title(examples.target_class[i])}"\n')
            assert whole == [*examples.prompt_tokens(i).tolist(), *answer]


def test_statistics_are_of_the_catalogue(built: Catalog) -> None:
    stats, titles = built.stats, [built.trie.title_tokens(c) for c in range(built.num_classes)]
    assert (stats["items"], stats["classes"]) == (60, 54)
    assert stats["title_tokens"]["max"] == max(map(len, titles)) == built.trie.max_tokens == stats["trie"]["depth"]
    assert stats["title_tokens"]["mean"] == pytest.approx(np.mean([len(title) for title in titles]))
    lengths = np.concatenate([built.examples(split).prompt_lengths for split in SPLITS])
    assert stats["prompt_tokens"]["p95"] == pytest.approx(np.quantile(lengths, 0.95))
    assert sum(stats["examples"].values()) == len(lengths)
    assert stats["truncated_prompts"] == 0
    assert built.examples("test").best_rank is not None


def test_long_prompts_lose_their_first_tokens_and_are_counted(built: Catalog, tiny_tokenizer_dir: Path) -> None:
    cache = built.path.parent
    short = build_catalog(config(cache, max_prompt_tokens=200), str(tiny_tokenizer_dir))
    lost = 0
    for split in SPLITS:
        for i in range(len(short.examples(split))):
            whole = built.examples(split).prompt_tokens(i)
            lost += len(whole) > 200
            assert short.examples(split).prompt_tokens(i).tolist() == whole[-200:].tolist()
    assert 0 < lost == short.stats["truncated_prompts"]


def test_a_catalogue_is_reused_until_something_it_depends_on_changes(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    folder = write_folder(tmp_path / "data", TITLES)
    base = config(tmp_path / "cache", path=str(folder))
    first = build_catalog(base, str(tiny_tokenizer_dir))
    before = (first.path / "trie.arrow").stat().st_mtime_ns
    again = build_catalog(base, str(tiny_tokenizer_dir))
    assert (again.path, (again.path / "trie.arrow").stat().st_mtime_ns) == (first.path, before)

    train_byte_bpe(["Acme Bolt"] * 9, 280, tmp_path / "other")
    others = [
        build_catalog(replace(base, max_history=1), str(tiny_tokenizer_dir)),
        build_catalog(replace(base, template=TemplateConfig(separator="; ")), str(tiny_tokenizer_dir)),
        build_catalog(base, str(tmp_path / "other")),
        build_catalog(replace(base, path=None), str(tiny_tokenizer_dir)),
        build_catalog(replace(base, path=None, generated=replace(SMALL, seed=2)), str(tiny_tokenizer_dir)),
    ]
    write_folder(tmp_path / "renamed", [*TITLES[:3], "Acme Screw"])
    others.append(build_catalog(replace(base, path=str(tmp_path / "renamed")), str(tiny_tokenizer_dir)))
    assert len({catalog.path for catalog in (first, *others)}) == 7
    assert len({catalog.fingerprint for catalog in (first, *others)}) == 7


def test_the_tokenizer_travels_with_the_catalogue(built: Catalog, tiny_tokenizer_dir: Path) -> None:
    assert Path(built.tokenizer_path).parent == built.path
    assert load_tokenizer(built.tokenizer_path).get_vocab() == load_tokenizer(tiny_tokenizer_dir).get_vocab()


def test_pickling_sends_the_path_only(built: Catalog) -> None:
    sent = pickle.dumps(built)
    assert len(sent) < 500
    assert pickle.loads(sent).examples("train").target_class.tolist() == built.examples("train").target_class.tolist()


def test_examples_are_mapped_not_copied(built: Catalog) -> None:
    prompt = Catalog.load(built.path).examples("train").prompt_tokens(3)
    assert prompt.dtype == np.int32
    assert not prompt.flags.owndata
    assert not prompt.flags.writeable


def test_building_at_once_leaves_one_whole_catalogue(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(build_catalog, config(tmp_path), str(tiny_tokenizer_dir)) for _ in range(4)]
        paths = {job.result().path for job in jobs}
    assert {path.name for path in tmp_path.iterdir()} == {TOKENIZERS, *(path.name for path in paths)}
    assert len(Catalog.load(paths.pop()).examples("train")) > 0


def test_titles_that_differ_only_for_the_eye_are_one(tmp_path: Path) -> None:
    """Qwen2's tokenizers compose Unicode, so that both spellings are the same tokens and one answer."""
    train_byte_bpe(["Café Nut Bolt Wire Response: history"], 300, tmp_path / "tokenizer")
    settings = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(settings | {"normalizer": {"type": "NFC"}}))
    titles = ["Nut", "Caf\u00e9", "Bolt", "Cafe\u0301"]
    folder = write_folder(tmp_path / "data", titles)
    catalog = build_catalog(config(tmp_path / "cache", path=str(folder)), str(tmp_path / "tokenizer"))
    assert catalog.trie.num_classes == 3
    train = catalog.examples("train")
    assert [catalog.title(int(target)) for target in train.target_class] == ["Bolt", "Caf\u00e9"]


def test_a_title_that_a_prompt_changes_is_named(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Though it keeps its tokens behind the end of the prompt alone."""
    shutil.copytree(tiny_tokenizer_dir, tmp_path / "tokenizer")
    settings = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    twice = {"type": "Replace", "pattern": {"Regex": '(?m)"Acme Bolt"[\\s\\S]*"Acme Bolt"'}, "content": "twice"}
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(settings | {"normalizer": twice}))
    folder = write_folder(tmp_path / "data", TITLES)
    with pytest.raises(CatalogError, match="does not keep the title '\"Acme Bolt\"\\\\n' apart from the prompt"):
        build_catalog(config(tmp_path / "cache", path=str(folder)), str(tmp_path / "tokenizer"))


def test_a_failed_build_leaves_nothing(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    folder = write_folder(tmp_path / "data", ["Bolt", "Nut", "Screw<|endoftext|>", "Wire"])
    with pytest.raises(CatalogError, match=r"title 'Screw<\|endoftext\|>'.*end-of-sequence"):
        build_catalog(config(tmp_path / "cache", path=str(folder)), str(tiny_tokenizer_dir))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [TOKENIZERS]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (TemplateConfig(prompt="History:\n"), r"template\.prompt must contain \{history\}"),
        (TemplateConfig(item="title"), r"template\.item must contain \{title\}"),
        (TemplateConfig(response="{title}{title}"), r"template\.response must contain \{title\} exactly once"),
        (TemplateConfig(prompt="History: {history}"), "no token of its own"),
    ],
)
def test_templates_that_cannot_work_are_named(
    tmp_path: Path, tiny_tokenizer_dir: Path, template: TemplateConfig, words: str
) -> None:
    with pytest.raises(CatalogError, match=words):
        build_catalog(config(tmp_path, template=template), str(tiny_tokenizer_dir))


@pytest.mark.parametrize("name", ["max_history", "max_prompt_tokens"])
def test_limits_below_one_are_named(tmp_path: Path, tiny_tokenizer_dir: Path, name: str) -> None:
    with pytest.raises(CatalogError, match=f"data.{name} must be 1 or more"):
        build_catalog(config(tmp_path, **{name: 0}), str(tiny_tokenizer_dir))


def test_a_folder_that_is_no_catalogue_says_where_catalogues_are(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"there is no catalog\.json.*runs/NAME/catalogue\.json"):
        Catalog.load(tmp_path)


@pytest.mark.parametrize("name", ["catalog.json", "trie.arrow", "items.arrow", "classes.arrow", "train.arrow"])
def test_damaged_files_are_named(tmp_path: Path, tiny_tokenizer_dir: Path, name: str) -> None:
    catalog = build_catalog(config(tmp_path), str(tiny_tokenizer_dir))
    content = (catalog.path / name).read_bytes()
    (catalog.path / name).write_bytes(content[: len(content) // 3])
    with pytest.raises(CatalogError, match=f"{name if name != 'catalog.json' else catalog.path.name}"):
        Catalog.load(catalog.path).examples("train")


@pytest.mark.parametrize("name", ["items.arrow", "classes.arrow", "train.arrow"])
def test_files_of_another_kind_are_named(tmp_path: Path, built: Catalog, name: str) -> None:
    damaged = Path(shutil.copytree(built.path, tmp_path / "damaged"))
    shutil.copy(built.path / ("items.arrow" if name == "classes.arrow" else "classes.arrow"), damaged / name)
    with pytest.raises(CatalogError, match=f"{name}: not a readable catalogue file .*delete {damaged} and build"):
        Catalog.load(damaged).examples("train")


@pytest.mark.parametrize("content", [b"{}", b"[]", b"3", b"\xff\xfe"])
def test_a_description_that_is_none_is_named(tmp_path: Path, built: Catalog, content: bytes) -> None:
    damaged = Path(shutil.copytree(built.path, tmp_path / "damaged"))
    (damaged / "catalog.json").write_bytes(content)
    with pytest.raises(CatalogError, match=f"{damaged}: not a built catalogue .*delete it and build it again"):
        Catalog.load(damaged)


def test_files_of_another_catalogue_are_noticed(tmp_path: Path, tiny_tokenizer_dir: Path, built: Catalog) -> None:
    mine = config(tmp_path / "cache", path=str(write_folder(tmp_path / "data", TITLES)))
    own = build_catalog(mine, str(tiny_tokenizer_dir)).path
    whole = shutil.copytree(own, tmp_path / "whole")
    for name in ("catalog.json", "trie.arrow", "items.arrow", "classes.arrow", "train.arrow"):
        shutil.copy(built.path / name, own / name)
        with pytest.raises(CatalogError, match=f"{own}: holds files of another catalogue; delete it and build"):
            build_catalog(mine, str(tiny_tokenizer_dir))
        shutil.copy(whole / name, own / name)
    trie = Trie.load(own / "trie.arrow")
    for wrong in (trie.num_nodes, -2 - trie.num_classes):
        targets = trie.edge_target.copy()
        targets[0] = wrong
        replace(trie, edge_target=targets).save(own / "trie.arrow")
        with pytest.raises(CatalogError, match=f"{own}: holds files of another catalogue"):
            build_catalog(mine, str(tiny_tokenizer_dir))
    shutil.copy(whole / "trie.arrow", own / "trie.arrow")
    shutil.rmtree(own / "tokenizer")
    with pytest.raises(CatalogError, match=f"{own}: holds files of another catalogue"):
        build_catalog(mine, str(tiny_tokenizer_dir))
    shutil.rmtree(own)
    shutil.copytree(built.path, own)
    with pytest.raises(CatalogError, match=f"{own}: holds files of another catalogue"):
        build_catalog(mine, str(tiny_tokenizer_dir))


def test_a_trie_of_another_tokenizer_is_refused(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    train_byte_bpe(["Acme Bolt"] * 9, 280, tmp_path / "other")
    own, other = (build_catalog(config(tmp_path), str(path)) for path in (tiny_tokenizer_dir, tmp_path / "other"))
    shutil.copy(other.path / "trie.arrow", own.path / "trie.arrow")
    with pytest.raises(CatalogError, match=rf"{own.path.name}: its titles were tokenised by .*; delete .* again"):
        build_catalog(config(tmp_path), str(tiny_tokenizer_dir))


def test_an_unknown_split_is_named(built: Catalog) -> None:
    with pytest.raises(CatalogError, match="'dev'"):
        built.examples("dev")


def test_texts_to_train_a_tokenizer_on_hold_all_titles_and_the_prompt(tmp_path: Path) -> None:
    texts = catalog_texts(config(tmp_path))
    assert sum(text.startswith('"') for text in texts) == 60
    assert all(TemplateConfig().prompt.split("{history}")[0] in text for text in texts[60:])
    assert len(texts) > 100
    assert texts == catalog_texts(config(tmp_path))


def test_description_is_readable(built: Catalog) -> None:
    assert set(json.loads((built.path / "catalog.json").read_text())) == {"fingerprint", "stats"}


@pytest.mark.slow
def test_real_titles_build(shared_dir: Path, golden_dir: Path, tmp_path: Path) -> None:
    catalog = build_catalog(config(tmp_path, path=str(shared_dir / "data/industrial")), str(golden_dir / "model"))
    assert (catalog.stats["classes"], catalog.stats["items"]) == (3646, 3686)
    items = pq.read_table(shared_dir / "data/industrial/items.parquet").to_pydict()
    test = pq.read_table(shared_dir / "data/industrial/test.parquet").to_pydict()
    title = dict(zip(items["item_id"], items["title"], strict=True))
    examples = catalog.examples("test")
    assert [catalog.title(c) for c in examples.target_class] == [title[target] for target in test["target"]]


def test_a_build_uses_all_cores_and_says_how_far_it_is(
    tiny_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PARALLEL, "false")
    config = DataConfig(cache=str(tmp_path), generated=GeneratedConfig(items=40, users=40))
    said: dict[str, str] = {}
    build_catalog(config, str(tiny_tokenizer_dir), lambda words: said.update({words: os.environ[PARALLEL]}))
    assert {"titles tokenised: 0 of 40", "title tokens checked: 0 of 40"} <= said.keys()
    assert any(words.startswith("prompts: 0 of") for words in said)
    assert set(said.values()) == {"true"}
    assert os.environ[PARALLEL] == "false"
