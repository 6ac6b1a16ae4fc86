"""The semantic reward: how close a candidate's meaning is to the target's."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rewards.embeddings import cached, embed_titles, fingerprint_of_model
from rewards.errors import RewardError
from rewards.group import NO_TITLE, Groups, TitleCatalog, all_titles, titles_fingerprint

LOWEST = -1.0
"""Reward of a candidate that is no title: the lowest cosine there is."""


class Semantic:
    """The registered reward `semantic`: cosine of the candidate's and the target's title embeddings.

    The embeddings come from a sentence-transformers `model` (a folder, or a name in the local Hugging Face cache), and
    are computed once per catalogue and model; or from a Parquet file `embeddings` with the columns `title` and
    `embedding` (a list of numbers, of one length for every title of the catalogue).
    """

    def __init__(
        self,
        catalog: TitleCatalog,
        model: str | None = None,
        embeddings: str | None = None,
        cache: str = ".cache/embeddings",
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        """Raises RewardError unless one of model and embeddings, not both, gives a vector for every title."""
        titles = all_titles(catalog)
        if embeddings and not model:
            vectors = read_embeddings(Path(embeddings), titles)
        elif model and not embeddings:
            file = Path(cache) / f"{titles_fingerprint(titles)}-{fingerprint_of_model(model)}.npy"
            vectors = cached(file, lambda: embed_titles(model, titles, batch_size, device))
        else:
            raise RewardError("reward 'semantic' needs either args.model or args.embeddings")
        self.vectors = unit_rows(vectors)

    def __call__(self, groups: Groups) -> pa.ListArray:
        classes = groups.layout.flat(groups.table["candidate_class"])
        target = groups.table["target_class"].to_numpy()[groups.layout.group]
        cosine = np.einsum("nd,nd->n", self.vectors[classes], self.vectors[target])
        return groups.layout.column(np.where(classes == NO_TITLE, LOWEST, cosine))


def read_embeddings(file: Path, titles: list[str]) -> np.ndarray:
    """float32 [titles, D] from a Parquet file with the columns `title` and `embedding`. Raises RewardError."""
    try:
        table = pq.read_table(file, columns=["title", "embedding"])
    except (OSError, pa.ArrowException) as error:
        raise RewardError(f"reward 'semantic': {file} has no readable columns title and embedding: {error}") from error
    row_of = {title: row for row, title in enumerate(table["title"].to_pylist())}
    missing = [title for title in titles if title not in row_of]
    if missing:
        raise RewardError(
            f"reward 'semantic': {file} lacks {len(missing)} of {len(titles)} titles, the first is {missing[0]!r}"
        )
    lists = table["embedding"].combine_chunks()
    if not _is_list_of_numbers(lists.type):
        raise RewardError(
            f"reward 'semantic': the column embedding of {file} is {lists.type}; it must hold a list of numbers for "
            "every title, such as list<float>"
        )
    lengths = set(lists.value_lengths().to_pylist())
    if len(lengths) != 1 or None in lengths or 0 in lengths:
        raise RewardError(f"reward 'semantic': the embeddings in {file} have the lengths {sorted(lengths, key=str)}")
    vectors = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), -1)
    return vectors[[row_of[title] for title in titles]]


def _is_list_of_numbers(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """float32 [C, D]: rows of length 1. Raises RewardError for a row whose length is not finite and positive."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    wrong = np.flatnonzero(~(np.isfinite(length) & (length > 0)))
    if len(wrong):
        raise RewardError(
            f"reward 'semantic': the embedding of item class {wrong[0]} has length {length[wrong[0], 0]}"
        )
    return (vectors / length).astype(np.float32)
