"""A fingerprint of what a tokenizer does, remembered so that the tokenizer need not be loaded to know it."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from catalog.atomic import atomic_file
from catalog.tokenizer import encode_batch, load_tokenizer, start_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FINGERPRINT_PROBE = (
    'Pack of 10, 3/8" x 36\', 12.5 kg – naïve Größe\n \n### Response:\n"工业 Ltd."\n\t\t  don\'t <|endoftext|>'
    " Cafe\u0301 A\u030a ｶﾞ ﬁne ½ m² İSTANBUL zero\u200bwidth"
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")
"""Files of a Hugging Face directory that say nothing about its tokenizer."""


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
    if Path(path).is_dir():
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
