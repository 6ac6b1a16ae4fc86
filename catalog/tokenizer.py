"""Prompts and titles as tokens: a title is tokenised where it will stand, behind the prompt's end."""

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from catalog.errors import CatalogError
from catalog.ragged import Ragged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARALLEL = "TOKENIZERS_PARALLELISM"
BATCH = 8192
LEAST_TOKENS = 4
"""Beside those that settings may add: where transformers finds no file of tokens, it makes do with one or two."""
Report = Callable[[str], None]
"""Is told in words how far long work is."""


def silent(words: str) -> None:
    """The Report of work that nobody watches."""


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face directory. Raises CatalogError where it cannot serve title generation."""
    from transformers import AutoTokenizer  # takes seconds and 250 MiB

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # files that are damaged raise whatever reading them came to
        raise CatalogError(
            f"{path}: no tokenizer could be loaded ({type(error).__name__}: {' '.join(str(error).split())}); give a "
            "Hugging Face directory"
        ) from error
    if not tokenizer.is_fast:
        raise CatalogError(f"{path}: a fast tokenizer (tokenizer.json) is needed; convert it with transformers")
    added = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if len(tokenizer.get_vocab().keys() - added) < LEAST_TOKENS:
        raise CatalogError(
            f"{path}: the tokenizer has special tokens and no others, so the file of its vocabulary is missing "
            "(tokenizer.json, vocab.json with merges.txt, tokenizer.model)"
        )
    if tokenizer.eos_token_id is None:
        raise CatalogError(
            f"{path}: the tokenizer has no end-of-sequence token, so no title could end; "
            "set eos_token in tokenizer_config.json to the token that ends the model's answers"
        )
    return tokenizer


def start_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer itself puts before a text: often the beginning-of-sequence token, or nothing."""
    text, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    places = range(len(whole) - len(text) + 1)
    return whole[: next((place for place in places if whole[place : place + len(text)] == text), 0)]


@contextmanager
def on_all_cores() -> Iterator[None]:
    """Tokenise on all cores meanwhile, whatever TOKENIZERS_PARALLELISM says for other times."""
    said = os.environ.get(PARALLEL)
    os.environ[PARALLEL] = "true"
    try:
        yield
    finally:
        del os.environ[PARALLEL]
        if said is not None:
            os.environ[PARALLEL] = said


def encode_batch(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> Ragged:
    """Token ids of each text, without special tokens, padding or truncation."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return Ragged.concatenate(
        Ragged.from_lists([encoding.ids for encoding in backend.encode_batch_fast(batch, add_special_tokens=False)])
        for batch in _batches(texts)
    )


def encode_prompts(tokenizer: "PreTrainedTokenizerBase", prompts: Iterable[str]) -> Ragged:
    """Token ids of each prompt, behind what the tokenizer itself puts before a text."""
    tokens, start = encode_batch(tokenizer, prompts), start_tokens(tokenizer)
    places, starts = np.repeat(tokens.start[:-1], len(start)), np.tile(np.array(start, np.int32), len(tokens))
    return Ragged(np.insert(tokens.flat, places, starts), tokens.start + len(start) * np.arange(len(tokens) + 1))


def encode_titles(
    tokenizer: "PreTrainedTokenizerBase",
    context: str,
    responses: Sequence[str],
    names: Sequence[str],
    report: Report = silent,
) -> Ragged:
    """Token ids of each response as it continues `context`, end-of-sequence last.

    context: the constant text that ends every prompt. responses: the text to generate for each title.
    names: what an error calls each of them. Raises CatalogError when a response merges with the context, cannot be
    decoded to its own text, or contains the end-of-sequence token.
    """
    prefix = encode_batch(tokenizer, [context])[0]
    tokens = encode_batch(
        tokenizer, (context + response for response in counted(responses, "titles", len(responses), report))
    )
    merged = np.flatnonzero(~_starts_with(tokens, prefix))
    if len(merged):
        raise CatalogError(
            f"{names[merged[0]]}: the tokenizer merges the start of {responses[merged[0]]!r} with the end of the "
            f"prompt {context!r}; change data.template.response or data.template.prompt so that a token ends between"
        )
    in_context = np.delete(tokens.flat, (tokens.start[:-1, None] + np.arange(len(prefix))).ravel())
    titles = Ragged.from_lengths(in_context, tokens.lengths - len(prefix))
    ended = np.flatnonzero(np.add.reduceat(titles.flat == tokenizer.eos_token_id, titles.start[:-1]))
    if len(ended):
        raise CatalogError(
            f"{names[ended[0]]}: the text {responses[ended[0]]!r} contains the end-of-sequence token "
            f"{tokenizer.eos_token!r}; remove it from the title"
        )
    _check_round_trip(tokenizer, context, tokens, responses, names, report)
    return titles.append(tokenizer.eos_token_id)


def check_response(tokenizer: "PreTrainedTokenizerBase", response: str) -> None:
    """Raise CatalogError where the response without a title contains the end-of-sequence token."""
    if tokenizer.eos_token_id in encode_batch(tokenizer, [response])[0]:
        raise CatalogError(
            f"data.template.response contains the end-of-sequence token {tokenizer.eos_token!r}, which follows every "
            "title by itself: leave it out"
        )


def _check_round_trip(
    tokenizer: "PreTrainedTokenizerBase",
    context: str,
    tokens: Ragged,
    responses: Sequence[str],
    names: Sequence[str],
    report: Report,
) -> None:
    """Decoding tokens[i] must give context + responses[i], where a tokenizer may normalise to Unicode's NFC."""
    decode = tokenizer.backend_tokenizer.decode_batch
    for first in range(0, len(responses), BATCH):
        report(f"title tokens checked: {first:,} of {len(responses):,}")
        rows = range(first, min(first + BATCH, len(responses)))
        texts = decode([tokens[i].tolist() for i in rows], skip_special_tokens=False)
        for i, text in zip(rows, texts, strict=True):
            if not text.endswith((responses[i], unicodedata.normalize("NFC", responses[i]))):
                raise CatalogError(
                    f"{names[i]}: the tokenizer cannot round-trip {responses[i]!r}, it comes back as "
                    f"{text[len(context) :]!r}; correct the title or use a byte-level tokenizer"
                )


def _starts_with(tokens: Ragged, prefix: np.ndarray) -> np.ndarray:
    """bool [n]: whether each list continues `prefix` by at least one token."""
    starts = tokens.lengths > len(prefix)
    for offset, token in enumerate(prefix):
        at = np.minimum(tokens.start[:-1] + offset, len(tokens.flat) - 1)
        starts &= tokens.flat[at] == token
    return starts


def counted(texts: Iterable[str], what: str, total: int, report: Report) -> Iterator[str]:
    """`texts`, saying now and then how many of `total` have been tokenised."""
    for number, text in enumerate(texts):
        if number % BATCH == 0:
            report(f"{what} tokenised: {number:,} of {total:,}")
        yield text


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
        yield batch
