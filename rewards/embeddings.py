"""Title embeddings by a sentence-transformers model, computed once per catalogue and model."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from catalog.atomic import atomic_file
from rewards.errors import RewardError


def embed_titles(model: str, titles: list[str], batch_size: int, device: str | None) -> np.ndarray:
    """float32 [titles, D]. Raises RewardError when sentence-transformers or the model is missing."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise RewardError(
            "reward 'semantic' with args.model needs sentence-transformers: pip install 'rere[semantic]', or give "
            "precomputed args.embeddings"
        ) from error
    try:
        encoder = SentenceTransformer(model, device=device)
    except (OSError, ValueError) as error:
        raise RewardError(f"reward 'semantic': model {model!r} does not load: {error}") from error
    return encoder.encode(titles, batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)


def fingerprint_of_model(model: str) -> str:
    """16 hexadecimal digits over every file of a model's folder, or over the name of one in the local cache."""
    digest = hashlib.sha256(model.encode() if not Path(model).is_dir() else b"")
    for file in sorted(Path(model).rglob("*")) if Path(model).is_dir() else ():
        if file.is_file():
            digest.update(str(file.relative_to(model)).encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def cached(file: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in `file` (.npy), memory-mapped; computed and written first where there is none.

    Several actors may compute it at the same time.
    """
    if not file.is_file():
        with atomic_file(file) as partial, partial.open("wb") as stream:
            np.save(stream, compute())
    try:
        return np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise RewardError(f"{file} is damaged ({error}); delete it and it is computed again") from error
