"""A built catalogue: titles, trie and tokenised examples, mapped from disk."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catalog.arrow_files import read_arrow
from catalog.errors import CatalogError
from catalog.interactions import SPLITS
from catalog.ragged import Ragged
from catalog.trie import Trie

DESCRIPTION = "catalog.json"
DESCRIBED = ("fingerprint", "stats")
"""What it holds."""
EXAMPLE_COLUMNS = ("user_id", "history", "target", "target_class", "timestamp", "prompt_tokens")
"""Of every split's file."""


class Examples:
    """One split as a struct of arrays. An example's id is its row.

    >>> examples = catalog.examples("train")
    >>> examples.prompt_tokens(0), examples.target_class[0], examples.history_classes(0)
    """

    def __init__(self, batch: pa.RecordBatch, class_of_item: np.ndarray) -> None:
        self._users = batch.column("user_id")
        self._history = Ragged.from_arrow(batch.column("history"))
        self._prompts = Ragged.from_arrow(batch.column("prompt_tokens"))
        self._class_of_item = class_of_item
        self.target_item: np.ndarray = batch.column("target").to_numpy()
        """int32 [n]"""
        self.target_class: np.ndarray = batch.column("target_class").to_numpy()
        """int32 [n]"""
        known = "best_rank" in batch.schema.names
        self.best_rank: np.ndarray | None = batch.column("best_rank").to_numpy() if known else None
        """int32 [n]: rank of the target in the best possible ranking; the generated catalogue's test split only."""

    def __len__(self) -> int:
        return len(self.target_class)

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """int64 [n]: tokens of each prompt."""
        return self._prompts.lengths

    def prompt_tokens(self, i: int) -> np.ndarray:
        """int32 [L]"""
        return self._prompts[i]

    def user_id(self, i: int) -> str:
        return self._users[i].as_py()

    def users(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n]: for each row the place of its user among the users of `rows`, in the order of their ids."""
        encoded = pc.dictionary_encode(self._users.take(pa.array(rows)))
        place = np.empty(len(encoded.dictionary), np.int64)
        place[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(place))
        return place[encoded.indices.to_numpy()]

    def history_classes(self, i: int) -> np.ndarray:
        """int32 [H]: item classes of the history, oldest first; a prompt cut to data.max_prompt_tokens shows less."""
        return self._class_of_item[self._history[i]]


class Catalog:
    """Everything that is known before a model runs. Processes share it by its path: pickling sends only that.

    An item is a row of the data's item table; an item class is a distinct title, and what hits are counted by.

    >>> catalog = Catalog.load(path)
    >>> catalog.title(3), catalog.item_ids_of_class(3), catalog.trie.title_tokens(3)
    >>> catalog.examples("train").prompt_tokens(0)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            description = json.loads((path / DESCRIPTION).read_text())
            self._description: dict[str, Any] = {key: description[key] for key in DESCRIBED}
        except (FileNotFoundError, NotADirectoryError):
            raise CatalogError(
                f"{path}: not a built catalogue, there is no {DESCRIPTION}. Catalogues are the folders of data.cache, "
                "named by the fingerprint in runs/NAME/catalogue.json; one that is damaged is built again once deleted"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CatalogError(f"{path}: not a built catalogue ({error}); delete it and build it again") from error
        self.trie = Trie.load(path / "trie.arrow")
        items, classes = (
            read_arrow(path / "items.arrow", "item_id", "item_class"),
            read_arrow(path / "classes.arrow", "title"),
        )
        self.item_ids: pa.Array = items.column("item_id")
        """[items]: the ids of the data."""
        self.class_of_item: np.ndarray = items.column("item_class").to_numpy()
        """int32 [items]"""
        self.titles: pa.LargeStringArray = classes.column("title")
        """[classes]"""

    @classmethod
    def load(cls, path: str | Path) -> "Catalog":
        """Map a built catalogue. Raises CatalogError naming a file that is missing or damaged."""
        return cls(Path(path))

    def __reduce__(self) -> tuple[Callable[[str], "Catalog"], tuple[str]]:
        return Catalog.load, (str(self.path),)

    @property
    def num_classes(self) -> int:
        return len(self.titles)

    @property
    def eos_token(self) -> int:
        return self.trie.eos_token

    @property
    def tokenizer_path(self) -> str:
        """A copy of the tokenizer that the catalogue was built with."""
        return str(self.path / "tokenizer")

    @property
    def fingerprint(self) -> str:
        """Of everything that the catalogue was built from."""
        return self._description["fingerprint"]

    @property
    def stats(self) -> dict[str, Any]:
        """Numbers of items, classes, nodes and tokens; see catalog.statistics."""
        return self._description["stats"]

    def check_whole(self, fingerprint: str) -> None:
        """Raise CatalogError unless it has this fingerprint, a tokenizer, and files of the sizes that were built.

        The trie's edges must lead to nodes and titles that there are.
        """
        sizes = [len(self.item_ids), len(self.titles), self.trie.num_nodes, *map(len, self._splits.values())]
        target, classes = self.trie.edge_target, len(self.titles)
        leads_astray = target.max(initial=0) >= self.trie.num_nodes or -target.min(initial=0) != classes
        whole = sizes == self._sizes_when_built() and (self.path / "tokenizer").is_dir() and not leads_astray
        if self.fingerprint != fingerprint or not whole:
            raise CatalogError(f"{self.path}: holds files of another catalogue; delete it and build it again")

    def _sizes_when_built(self) -> list[int] | None:
        """Of `check_whole`; None where the description does not say them."""
        try:
            stats = self.stats
            nodes, examples = stats["trie"]["nodes"], [stats["examples"][split] for split in SPLITS]
            return [stats["items"], stats["classes"], nodes, *examples]
        except (KeyError, TypeError):
            return None

    def title(self, item_class: int) -> str:
        return self.titles[item_class].as_py()

    def item_ids_of_class(self, item_class: int) -> list[int | str]:
        """The data's ids of the items that bear the title."""
        items, start = self._items_by_class
        return self.item_ids.take(pa.array(items[start[item_class] : start[item_class + 1]])).to_pylist()

    def examples(self, split: str) -> Examples:
        """Raises CatalogError for a split other than "train", "valid" and "test"."""
        if split not in SPLITS:
            raise CatalogError(f"there is no split {split!r}, only {', '.join(SPLITS)}")
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[str, Examples]:
        return {
            split: Examples(read_arrow(self.path / f"{split}.arrow", *EXAMPLE_COLUMNS), self.class_of_item)
            for split in SPLITS
        }

    @cached_property
    def _items_by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """(items in order of their class, first of each class)"""
        order = np.argsort(self.class_of_item, kind="stable")
        return order, np.searchsorted(self.class_of_item[order], np.arange(self.num_classes + 1))
