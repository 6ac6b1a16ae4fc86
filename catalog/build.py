"""From data and a tokenizer to a catalogue on disk, built once for everything it depends on."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catalog.arrow_files import write_arrow
from catalog.atomic import atomic_folder
from catalog.catalog import DESCRIPTION, Catalog
from catalog.config import DataConfig
from catalog.errors import CatalogError
from catalog.generate import generate
from catalog.interactions import Interactions, SplitTable
from catalog.prompts import PromptEncoder, history_texts
from catalog.ragged import Ragged
from catalog.source import Source
from catalog.statistics import catalog_stats
from catalog.template import check_template, prompt_end, response_texts
from catalog.token_boundaries import check_prompt_ends, check_titles_follow
from catalog.tokenizer import Report, check_response, encode_titles, load_tokenizer, on_all_cores, silent
from catalog.tokenizer_fingerprint import known_fingerprint, remembered_fingerprint, tokenizer_fingerprint
from catalog.trie import Trie

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
"""Changes whenever the files or the generator do, so that nothing older is taken for them."""
TOKENIZERS = "tokenizers"
"""Folder in the cache: fingerprints of tokenizers by the contents of their files."""
PROMPTS_TO_LEARN_FROM = 2000
WHOLE_PROMPTS_CHECKED = 256


def build_catalog(config: DataConfig, tokenizer_path: str, report: Report = silent) -> Catalog:
    """Build the catalogue of `config`, or map the one that exists for the same data, tokenizer and template.

    Several processes may build at once: each writes to a folder of its own, and the first to finish names it.
    Raises CatalogError naming the file, column, row and value that are wrong.
    """
    _check_config(config)
    source, cache = _source(config), Path(config.cache)
    tokenizer = known_fingerprint(tokenizer_path, cache / TOKENIZERS)
    fingerprint = _fingerprint(config, source, tokenizer)
    path = cache / fingerprint
    if not path.is_dir():
        with atomic_folder(path) as temporary, on_all_cores():
            data = _interactions(config, source)
            _write(data, config, load_tokenizer(tokenizer_path), fingerprint, temporary, report)
    catalog = Catalog.load(path)
    if catalog.trie.tokenizer_fingerprint != tokenizer:
        raise CatalogError(
            f"{path}: its titles were tokenised by {catalog.trie.tokenizer_fingerprint}, but the tokenizer of "
            f"{tokenizer_path} is {tokenizer}; delete {path} and {cache / TOKENIZERS} and build it again"
        )
    catalog.check_whole(fingerprint)
    return catalog


def find_catalog(config: DataConfig, tokenizer_path: str) -> Catalog | None:
    """The catalogue that build_catalog would return where it is built already, else None. Raises CatalogError."""
    _check_config(config)
    source, cache = _source(config), Path(config.cache)
    tokenizer = remembered_fingerprint(tokenizer_path, cache / TOKENIZERS)
    path = None if tokenizer is None else cache / _fingerprint(config, source, tokenizer)
    return Catalog.load(path) if path is not None and path.is_dir() else None


def catalog_texts(config: DataConfig) -> list[str]:
    """Titles as they are generated and some prompts: what a tokenizer for this catalogue should be trained on."""
    _check_config(config)
    data = _interactions(config, _source(config))
    titles, train = data.titles.to_pylist(), data.splits["train"]
    histories = train.history.take(_evenly(len(train), PROMPTS_TO_LEARN_FROM))
    return response_texts(config.template, titles) + history_texts(config.template, titles, histories)


def _check_config(config: DataConfig) -> None:
    check_template(config.template)
    for name in ("max_history", "max_prompt_tokens"):
        if getattr(config, name) < 1:
            raise CatalogError(f"data.{name} must be 1 or more, got {getattr(config, name)}")


def _source(config: DataConfig) -> Source | None:
    return None if config.path is None else Source.of(Path(config.path))


def _interactions(config: DataConfig, source: Source | None) -> Interactions:
    return source.read(config.max_history) if source else generate(config.generated, config.max_history)


def _fingerprint(config: DataConfig, source: Source | None, tokenizer: str) -> str:
    content = {
        "format": FORMAT_VERSION,
        "data": source.fingerprint() if source else asdict(config.generated),
        "tokenizer": tokenizer,
        "template": asdict(config.template),
        "max_history": config.max_history,
        "max_prompt_tokens": config.max_prompt_tokens,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _write(
    data: Interactions,
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    fingerprint: str,
    path: Path,
    report: Report,
) -> None:
    class_of_item, titles = _classes(data.titles)
    texts = titles.to_pylist()
    context, responses = prompt_end(config.template), response_texts(config.template, texts)
    check_response(tokenizer, response_texts(config.template, [""])[0])
    title_tokens = encode_titles(tokenizer, context, responses, [f"title {title!r}" for title in texts], report)
    kept, merged = _distinct(title_tokens)
    if len(kept) < len(texts):  # the tokenizer normalises Unicode, and two titles differ only there
        class_of_item, titles, title_tokens = (
            merged[class_of_item],
            titles.take(pa.array(kept)),
            title_tokens.take(kept),
        )
        texts = titles.to_pylist()
        responses = response_texts(config.template, texts)
    trie = Trie.from_titles(
        title_tokens, eos_token=tokenizer.eos_token_id, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer)
    )
    trie.save(path / "trie.arrow")
    write_arrow(path / "items.arrow", {"item_id": data.item_ids, "item_class": pa.array(class_of_item)})
    write_arrow(path / "classes.arrow", {"title": titles})
    encoder = PromptEncoder(tokenizer, config.template, texts, report)
    prompt_lengths = {}
    for name, split in data.splits.items():
        histories = Ragged(class_of_item[split.history.flat], split.history.start)
        some = histories.take(_evenly(len(split), WHOLE_PROMPTS_CHECKED))
        check_titles_follow(tokenizer, encoder.texts(some), encoder.encode(some), responses, title_tokens)
        lengths: list[np.ndarray] = []
        shown = Ragged.concatenate(
            _shown(encoder.batches(histories), tokenizer, context, config.max_prompt_tokens, lengths)
        )
        prompt_lengths[name] = np.concatenate(lengths)
        write_arrow(path / f"{name}.arrow", _columns(split, class_of_item, shown))
    tokenizer.save_pretrained(path / "tokenizer")
    description = {
        "fingerprint": fingerprint,
        "stats": catalog_stats(len(data.titles), trie, title_tokens, prompt_lengths, config.max_prompt_tokens),
    }
    (path / DESCRIPTION).write_text(json.dumps(description, indent=2))


def _shown(
    batches: Iterable[Ragged],
    tokenizer: "PreTrainedTokenizerBase",
    context: str,
    max_prompt_tokens: int,
    lengths: list[np.ndarray],
) -> Iterator[Ragged]:
    """What a model is shown of the prompts, once their ends are checked; `lengths` takes their whole lengths."""
    for prompts in batches:
        check_prompt_ends(tokenizer, context, prompts)
        lengths.append(prompts.lengths)
        yield prompts.last(max_prompt_tokens)


def _classes(titles: pa.LargeStringArray) -> tuple[np.ndarray, pa.LargeStringArray]:
    """(int32 [items] item class of each item, distinct titles in the order of their first item)"""
    encoded = pc.dictionary_encode(titles)
    return encoded.indices.to_numpy(), encoded.dictionary


def _distinct(title_tokens: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """(int64: rows of distinct tokens, each at its first place; int32 [n]: for every row its place among them)"""
    place: dict[bytes, int] = {}
    kept: list[int] = []
    merged = np.empty(len(title_tokens), np.int32)
    for row in range(len(title_tokens)):
        merged[row] = place.setdefault(title_tokens[row].tobytes(), len(place))
        if merged[row] == len(kept):
            kept.append(row)
    return np.array(kept, np.int64), merged


def _evenly(count: int, at_most: int) -> np.ndarray:
    """int64: up to `at_most` of `count` rows, evenly spaced."""
    return np.linspace(0, count - 1, min(count, at_most)).astype(np.int64)


def _columns(split: SplitTable, class_of_item: np.ndarray, prompts: Ragged) -> dict[str, pa.Array]:
    columns = {
        "user_id": split.user_id,
        "history": split.history.to_arrow(),
        "target": pa.array(split.target, pa.int32()),
        "target_class": pa.array(class_of_item[split.target], pa.int32()),
        "timestamp": pa.array(split.timestamp, pa.int64()),
        "prompt_tokens": prompts.to_arrow(),
    }
    return columns if split.best_rank is None else columns | {"best_rank": pa.array(split.best_rank, pa.int32())}
