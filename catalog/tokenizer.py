"""Prompts and titles as tokens: a title is tokenised where it will stand, behind the prompt's end."""

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from catalog.atomic import atomic_file
from catalog.errors import CatalogError
from catalog.ragged import Ragged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FINGERPRINT_PROBE = (
    'Pack of 10, 3/8" x 36\', 12.5 kg – naïve Größe\n \n### Response:\n"工业 Ltd."\n\t\t  don\'t <|endoftext|>'
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")
"""Files of a Hugging Face directory that say nothing about its tokenizer."""
PARALLEL = "TOKENIZERS_PARALLELISM"
BATCH = 8192
Report = Callable[[str], None]
"""Is told in words how far long work is."""


def silent(words: str) -> None:
    """The Report of work that nobody watches."""


def train_byte_bpe(texts: Iterable[str], vocab_size: int, out_dir: Path) -> None:
    """Train a byte-level BPE with Qwen2's pre-tokenisation and save it as a Hugging Face tokenizer in `out_dir`.

    At most `vocab_size` tokens, fewer when the texts hold no more merges; the last is `<|endoftext|>`, which ends
    sequences and pads them. There is no beginning-of-sequence token. Every text can be encoded without loss.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise CatalogError(f"a byte-level vocabulary needs at least {len(alphabet) + 1} tokens, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(out_dir))


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face directory. Raises CatalogError where it cannot serve title generation."""
    from transformers import AutoTokenizer  # takes seconds and 250 MiB

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise CatalogError(f"{path}: no tokenizer could be loaded ({error}); give a Hugging Face directory") from error
    if not tokenizer.is_fast:
        raise CatalogError(f"{path}: a fast tokenizer (tokenizer.json) is needed; convert it with transformers")
    if tokenizer.eos_token_id is None:
        raise CatalogError(
            f"{path}: the tokenizer has no end-of-sequence token, so no title could end; "
            "set eos_token in tokenizer_config.json to the token that ends the model's answers"
        )
    return tokenizer


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Sixteen hex digits of what the tokenizer does: its vocabulary, its special tokens and how it cuts a probe text.

    Does not change when the tokenizer is saved and loaded again, nor with its padding and truncation settings.
    """
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "eos": tokenizer.eos_token_id,
        "start": start_tokens(tokenizer),
        "probe": encode_batch(tokenizer, [FINGERPRINT_PROBE])[0].tolist(),
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def known_fingerprint(path: str | Path, cache: Path) -> str:
    """tokenizer_fingerprint of a Hugging Face directory, remembered in `cache` by the contents of its files.

    Loading the tokenizer anew would take seconds, because transformers does to import. Raises as load_tokenizer.
    """
    if (remembered := remembered_fingerprint(path, cache)) is not None:
        return remembered
    fingerprint = tokenizer_fingerprint(load_tokenizer(path))
    with atomic_file(_fingerprint_file(path, cache)) as temporary:
        temporary.write_text(fingerprint)
    return fingerprint


def remembered_fingerprint(path: str | Path, cache: Path) -> str | None:
    """What known_fingerprint would read from `cache`; None where it would have to load the tokenizer."""
    known = _fingerprint_file(path, cache)
    return known.read_text() if known.is_file() and Path(path).is_dir() else None


def _fingerprint_file(path: str | Path, cache: Path) -> Path:
    """Where `cache` keeps the fingerprint of a tokenizer whose files have these contents."""
    content = [FINGERPRINT_PROBE, version("transformers"), version("tokenizers")]
    for file in sorted(Path(path).glob("*")):
        if file.is_file() and file.suffix not in WEIGHTS:
            content += [file.name, hashlib.sha256(file.read_bytes()).hexdigest()]
    return cache / hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]


def start_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer itself puts before a text: [bos], or nothing."""
    special = tokenizer.encode("")
    return special[:1] if special and special[0] == tokenizer.bos_token_id else []


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
    """Token ids of each prompt; the beginning-of-sequence token first where the tokenizer itself adds one."""
    tokens, start = encode_batch(tokenizer, prompts), start_tokens(tokenizer)
    if not start:
        return tokens
    return Ragged(np.insert(tokens.flat, tokens.start[:-1], start[0]), tokens.start + np.arange(len(tokens) + 1))


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


def check_prompt_ends(tokenizer: "PreTrainedTokenizerBase", context: str, prompts: Ragged) -> None:
    """Raise CatalogError unless all prompts end in the same tokens of `context`, on which the titles' tokens rest.

    The first tokens of the context may merge with the history before it; a token boundary inside it must remain.
    """
    tail = encode_batch(tokenizer, [context])[0]
    shared = len(tail)
    ends = prompts.last(len(tail))
    for back in range(1, len(tail) + 1):
        reaches = ends.lengths >= back
        if not (reaches.all() and (ends.flat[ends.start[1:] - back] == tail[-back]).all()):
            shared = back - 1
            break
    if not shared:
        raise CatalogError(
            f"the text behind {{history}} in data.template.prompt, {context!r}, has no token of its own in every "
            "prompt; end data.template.prompt with a fixed marker such as '### Response:\\n'"
        )


def check_titles_follow(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    prompt_tokens: Ragged,
    responses: Sequence[str],
    title_tokens: Ragged,
) -> None:
    """Raise CatalogError unless prompt + title is prompt tokens + title tokens, for each prompt with some title.

    prompts and prompt_tokens go together, and so do responses and title_tokens (end-of-sequence last).
    """
    titles = [i * 31 % len(responses) for i in range(len(prompts))]
    whole = encode_prompts(
        tokenizer, [prompt + responses[title] for prompt, title in zip(prompts, titles, strict=True)]
    )
    for i, title in enumerate(titles):
        if not np.array_equal(whole[i], np.concatenate([prompt_tokens[i], title_tokens[title][:-1]])):
            raise CatalogError(
                f"the tokenizer does not keep the title {responses[title]!r} apart from the prompt {prompts[i]!r}; "
                "end data.template.prompt with a fixed marker such as '### Response:\\n'"
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
