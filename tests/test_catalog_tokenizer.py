"""Tokens of prompts and titles: in context, without loss, bound to the tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from catalog.byte_bpe import train_byte_bpe
from catalog.errors import CatalogError
from catalog.token_boundaries import check_prompt_ends, check_titles_follow
from catalog.tokenizer import check_response, encode_batch, encode_prompts, encode_titles, load_tokenizer
from catalog.tokenizer_fingerprint import known_fingerprint, tokenizer_fingerprint

CONTEXT = "\n\n### Response:\n"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(tiny_tokenizer_dir)


def word_tokenizer(words: list[str], **special: str) -> PreTrainedTokenizerFast:
    """One token per word of a closed vocabulary."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", "<s>", *words])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="<eos>", **special)


@given(st.text())
def test_trained_tokenizer_loses_nothing(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(encode_batch(tokenizer, [text])[0]) == text


def test_trained_tokenizer_ends_and_pads_with_one_token_and_begins_with_none(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.bos_token is None
    assert len(tokenizer) <= 400
    assert encode_prompts(tokenizer, ["Bolt"])[0].tolist() == tokenizer.encode("Bolt")


def test_a_vocabulary_without_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="at least 257"):
        train_byte_bpe(["Bolt"], 256, tmp_path)


@given(st.lists(st.text(max_size=12), min_size=1, max_size=5))
def test_titles_continue_their_context(tokenizer: PreTrainedTokenizerFast, titles: list[str]) -> None:
    titles = [title.replace("<|endoftext|>", "") for title in titles]
    responses = [f'"{title}"\n' for title in titles]
    tokens = encode_titles(tokenizer, CONTEXT, responses, titles)
    whole = encode_batch(tokenizer, [CONTEXT + response for response in responses])
    prefix = encode_batch(tokenizer, [CONTEXT])[0].tolist()
    for i in range(len(titles)):
        assert [*prefix, *tokens[i].tolist()] == [*whole[i].tolist(), tokenizer.eos_token_id]


def test_titles_in_context_differ_from_titles_alone(tmp_path: Path) -> None:
    """Why context matters: a title is not always tokenised alone as it is behind the prompt."""
    train_byte_bpe(["\n\n\n", "a\n\n\n"] * 10, 260, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for response in ("\n\nx", "\n\n"):
        with pytest.raises(CatalogError, match=r"title 'x'.*merges"):
            encode_titles(tokenizer, "a\n", [response], ["title 'x'"])


def test_a_title_without_tokens_is_refused() -> None:
    with pytest.raises(CatalogError, match="merges the start of ' ' with the end of the prompt"):
        encode_titles(word_tokenizer(["Response:"]), "Response: ", [" "], ["title ' '"])


def test_a_title_may_hold_special_tokens_that_do_not_end_it() -> None:
    tokenizer = word_tokenizer(["Response:", "Bolt"], bos_token="<s>")
    assert encode_titles(tokenizer, "Response: ", ["Bolt <s>"], ["title 'Bolt <s>'"])[0].tolist() == [4, 2, 1]


def test_a_title_that_does_not_come_back_is_named() -> None:
    tokenizer = word_tokenizer(["Response:", "Bolt"])
    assert encode_titles(tokenizer, "Response: ", ["Bolt"], ["title 'Bolt'"])[0].tolist() == [4, 1]
    with pytest.raises(CatalogError, match=r"title 'Zwölf'.*cannot round-trip"):
        encode_titles(tokenizer, "Response: ", ["Bolt", "Zwölf"], ["title 'Bolt'", "title 'Zwölf'"])


def test_a_title_with_the_end_of_sequence_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CatalogError, match=r"title 'b'.*contains the end-of-sequence token"):
        encode_titles(tokenizer, CONTEXT, ["Bolt\n", "a<|endoftext|>\n"], ["title 'a'", "title 'b'"])


def test_a_response_that_ends_itself_is_the_templates_fault(tokenizer: PreTrainedTokenizerFast) -> None:
    check_response(tokenizer, "\n")
    with pytest.raises(CatalogError, match=r"data\.template\.response contains the end-of-sequence token .*leave it"):
        check_response(tokenizer, "\n<|endoftext|>")


def test_prompts_begin_as_the_tokenizer_begins_them() -> None:
    tokenizer = word_tokenizer(["Bolt"], bos_token="<s>")
    assert encode_prompts(tokenizer, ["Bolt", "Bolt Bolt"])[1].tolist() == [2, 3, 3] == tokenizer.encode("Bolt Bolt")
    closing = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = closing
    assert tokenizer.encode("Bolt") == [3, 1]
    assert encode_prompts(tokenizer, ["Bolt"])[0].tolist() == [3]  # a title goes on from here
    both = processors.TemplateProcessing(single="<s> <eos> $A <eos>", special_tokens=[("<s>", 2), ("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = both  # as GLM's, whose first two tokens are no bos
    prompts = encode_prompts(tokenizer, ["Bolt", "Bolt Bolt"])
    assert [prompts[0].tolist(), prompts[1].tolist()] == [[2, 1, 3], [2, 1, 3, 3]]


def test_what_a_tokenizer_was_used_for_changes_no_tokens() -> None:
    tokenizer = word_tokenizer(["Bolt"], pad_token="<unk>")
    tokenizer(["Bolt"], padding="max_length", truncation=True, max_length=4)
    assert encode_batch(tokenizer, ["Bolt", "Bolt " * 6]).lengths.tolist() == [1, 6]


def test_prompts_must_end_in_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    good = encode_prompts(tokenizer, ['"Bolt"' + CONTEXT, "Nut" + CONTEXT])
    check_prompt_ends(tokenizer, CONTEXT, good)
    with pytest.raises(CatalogError, match="no token of its own"):
        check_prompt_ends(tokenizer, "", good)
    with pytest.raises(CatalogError, match="no token of its own"):
        check_prompt_ends(tokenizer, CONTEXT, encode_prompts(tokenizer, ["Bolt" + CONTEXT, "Nut"]))


def test_whole_prompts_reveal_what_the_context_hides(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts, responses = ["Bolt" + CONTEXT], ["Nut\n"]
    titles = encode_titles(tokenizer, CONTEXT, responses, responses)
    check_titles_follow(tokenizer, prompts, encode_prompts(tokenizer, prompts), responses, titles)
    with pytest.raises(CatalogError, match="does not keep the title"):
        check_titles_follow(tokenizer, prompts, encode_prompts(tokenizer, ["Nut" + CONTEXT]), responses, titles)


def test_fingerprint_survives_saving_and_settings_but_not_other_tokens(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    again(["Bolt", "Bolt and Nut"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(again) == before
    train_byte_bpe(["Bolt and Nut"] * 20, 270, tmp_path / "other")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "other")) != before
    again.add_tokens(["<extra>"])
    assert tokenizer_fingerprint(again) != before


def test_a_tokenizer_without_an_end_or_of_python_code_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(CatalogError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    with pytest.raises(CatalogError, match=r"bytes: a fast tokenizer \(tokenizer\.json\) is needed"):
        load_tokenizer(tmp_path / "bytes")
    with pytest.raises(CatalogError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class"),
    [("qwen2", "Qwen2Tokenizer"), ("llama", "LlamaTokenizer"), ("t5", "T5Tokenizer")],
)
def test_a_tokenizer_without_a_vocabulary_is_refused(model_type: str, tokenizer_class: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    added = {str(token): {"content": f"<tool_{token}>", "special": False} for token in range(9)}
    settings = {"tokenizer_class": tokenizer_class, "eos_token": "</s>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CatalogError, match="special tokens and no others"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": ["</s>"]}'),
        ("tokenizer_config.json", '{"eos_token": 5}'),
    ],
)
def test_a_damaged_tokenizer_is_named(tiny_tokenizer_dir: Path, tmp_path: Path, file: str, content: str) -> None:
    path = shutil.copytree(tiny_tokenizer_dir, tmp_path / "damaged")
    (path / file).write_text(content)
    with pytest.raises(CatalogError, match=r"damaged: no tokenizer could be loaded \(\w+: .*\); give a"):
        load_tokenizer(path)


def test_golden_prompts_have_their_published_length(golden_dir: Path) -> None:
    tokenizer = load_tokenizer(golden_dir / "model")
    examples = pq.read_table(golden_dir / "examples.parquet").to_pydict()
    titles = pq.read_table(golden_dir / "items.parquet")["title"].to_pylist()
    prompts = encode_prompts(tokenizer, examples["prompt"])
    assert prompts.lengths.tolist() == examples["prompt_tokens"]
    check_prompt_ends(tokenizer, CONTEXT, prompts)
    responses = encode_titles(tokenizer, CONTEXT, [f'"{title}"\n' for title in titles], titles)
    whole = encode_prompts(tokenizer, [a + b for a, b in zip(examples["prompt"], examples["completion"], strict=True)])
    for i, target in enumerate(examples["target_item_id"]):
        assert np.array_equal(whole[i], np.concatenate([prompts[i], responses[target][:-1]]))


def test_a_known_tokenizer_is_not_loaded_again(
    tiny_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_tokenizer_dir, copy)
    expected = tokenizer_fingerprint(load_tokenizer(copy))
    assert known_fingerprint(copy, tmp_path / "cache") == expected
    monkeypatch.setattr("catalog.tokenizer_fingerprint.load_tokenizer", None)
    assert known_fingerprint(tiny_tokenizer_dir, tmp_path / "cache") == expected
    monkeypatch.undo()

    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<unk>", "unk_token": "<unk>"}))
    assert known_fingerprint(copy, tmp_path / "cache") != expected
