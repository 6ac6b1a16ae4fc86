"""Prompts joined from pieces equal prompts encoded whole, for any titles and templates."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from catalog.config import TemplateConfig
from catalog.prompts import PromptEncoder, history_texts
from catalog.ragged import Ragged
from catalog.tokenizer import encode_prompts, load_tokenizer

TEMPLATES = [
    TemplateConfig(),
    TemplateConfig(prompt="History: {history}\nNext:\n", separator=", "),
    TemplateConfig(prompt="{history} ->", item="{title}", separator=" | "),
    TemplateConfig(prompt="{history}.", item="{title}", separator=""),
]
HISTORIES = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(tiny_tokenizer_dir)


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=12), HISTORIES, st.sampled_from(TEMPLATES))
def test_joined_prompts_equal_whole_ones(
    tokenizer: PreTrainedTokenizerFast, titles: list[str], histories: list, template: TemplateConfig
) -> None:
    encoder = PromptEncoder(tokenizer, template, titles)
    shown = Ragged.from_lists([[c % len(titles) for c in history] for history in histories])
    with patch("catalog.prompts.SHOWN_AT_ONCE", 3):
        batches = list(encoder.batches(shown))
    assert len(batches) >= len(shown.flat) / 5  # a history of up to 5 titles may be longer than a batch
    prompts, whole = Ragged.concatenate(batches), encode_prompts(tokenizer, encoder.texts(shown))
    assert prompts.start.tolist() == whole.start.tolist()
    assert prompts.flat.tolist() == whole.flat.tolist()


def test_text_of_a_prompt() -> None:
    template = TemplateConfig(prompt="Seen: {history}.\n", item="<{title}>", separator="; ")
    texts = history_texts(template, ["Bolt", "{history}"], Ragged.from_lists([[0], [1, 0]]))
    assert texts == ["Seen: <Bolt>.\n", "Seen: <{history}>; <Bolt>.\n"]


def test_real_titles_are_joined_exactly(shared_dir: Path, golden_dir: Path) -> None:
    """On real titles the short cut is taken, and every prompt it gives is the whole prompt's."""
    titles = pq.read_table(shared_dir / "data/industrial/items.parquet")["title"].to_pylist()[:800]
    tokenizer = load_tokenizer(golden_dir / "model")
    encoder = PromptEncoder(tokenizer, TemplateConfig(), titles)
    assert encoder._pieces is not None
    draw = np.random.default_rng(0)
    histories = Ragged.from_lists([draw.integers(len(titles), size=size) for size in draw.integers(1, 11, 1000)])
    prompts, whole = encoder.encode(histories), encode_prompts(tokenizer, encoder.texts(histories))
    assert np.array_equal(prompts.flat, whole.flat)
    assert np.array_equal(prompts.start, whole.start)


def test_tokens_that_reach_from_title_to_title_are_found_whatever_the_titles() -> None:
    """A tokenizer that splits nothing beforehand: by its merges '!,' a cut behind the comma holds for some pairs."""
    letters = {letter: place for place, letter in enumerate("abcdefghijklmnopqrstuvwxyz0123456789!,: \n#")}
    merges = [("!", ","), (" ", "x"), (",", " ")]
    vocabulary = {**letters, **{"".join(pair): len(letters) + place for place, pair in enumerate(merges)}}
    model = Tokenizer(models.BPE(vocab={**vocabulary, "<e>": len(vocabulary)}, merges=merges))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<e>")
    titles = [f"x{i}!" if i % 2 == 0 else f"n{i}" for i in range(40)]
    template = TemplateConfig(prompt="a: {history}#\n", item="{title}", separator=", ", response="{title}\n")
    encoder, shown = PromptEncoder(tokenizer, template, titles), Ragged.from_lists([[1, 3], [0, 1], [2, 4]])
    prompts, whole = encoder.encode(shown), encode_prompts(tokenizer, encoder.texts(shown))
    assert prompts.flat.tolist() == whole.flat.tolist()
    assert prompts.start.tolist() == whole.start.tolist()
