"""A golden folder: what the published code computed on a tiny model, and the model, items and examples it used."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from catalog.config import TemplateConfig
from catalog.template import prompt_end, response_texts
from catalog.tokenizer import encode_prompts, encode_titles, load_tokenizer
from catalog.tokenizer_fingerprint import tokenizer_fingerprint
from catalog.trie import Trie

MAX_PROMPT_TOKENS = 512
NO_CLASS = -1


class GoldenError(ValueError):
    """A golden folder lacks a file, or a file is damaged; the message names it."""


class GoldenSet:
    """Reads a golden folder on demand.

    >>> golden = GoldenSet(Path("../shared/golden"))
    >>> golden.json("rewards.json")["groups"]
    >>> with golden.reading("loss.json"): ...          # what is missing inside becomes a GoldenError
    """

    def __init__(self, folder: Path) -> None:
        """Raises GoldenError where `folder` is none, or has no model."""
        self.folder = folder
        if not (folder / "model" / "config.json").is_file():
            raise GoldenError(f"{folder}: not a golden set, it has no model/config.json")

    @property
    def model_path(self) -> Path:
        return self.folder / "model"

    def path(self, name: str) -> Path:
        """A file of the set. Raises GoldenError where it is absent."""
        path = self.folder / name
        if not path.is_file():
            raise GoldenError(f"{path} is missing")
        return path

    def json(self, name: str) -> Any:
        path = self.path(name)
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise GoldenError(f"{path} is damaged: {error}") from error

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        path = self.path(name)
        try:
            return load_file(path)
        except SafetensorError as error:
            raise GoldenError(f"{path} is damaged: {error}") from error

    def table(self, name: str) -> pa.Table:
        path = self.path(name)
        try:
            return pq.read_table(path)
        except pa.ArrowException as error:
            raise GoldenError(f"{path} is damaged: {error}") from error

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Name the file when something that it should hold is not there."""
        try:
            yield
        except (KeyError, IndexError) as error:
            raise GoldenError(f"{self.folder / name} is damaged: it lacks {error}") from error

    def trajectories(self) -> list[str]:
        """Names of the recorded training runs."""
        return sorted(path.stem for path in (self.folder / "trajectory").glob("*.json"))

    def load_model(self) -> PreTrainedModel:
        """The model in float32."""
        return AutoModelForCausalLM.from_pretrained(self.model_path, dtype=torch.float32)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model_path)

    @cached_property
    def class_of_item(self) -> dict[int, int]:
        """Item class (distinct title) of every item id."""
        with self.reading("items.parquet"):
            items = self.table("items.parquet")
            title_class = {title: index for index, title in enumerate(dict.fromkeys(items["title"].to_pylist()))}
            ids, titles = items["item_id"].to_pylist(), items["title"].to_pylist()
            return {item: title_class[title] for item, title in zip(ids, titles, strict=True)}

    def classes(self, items: list[int | None]) -> list[int]:
        """Item classes of item ids; -1 for what is no item."""
        return [NO_CLASS if item is None else self.class_of_item[item] for item in items]

    @cached_property
    def trie(self) -> Trie:
        """The trie of all titles, by item class."""
        titles = list(dict.fromkeys(self.table("items.parquet")["title"].to_pylist()))
        template = TemplateConfig()
        return Trie.from_titles(
            encode_titles(self.tokenizer, prompt_end(template), response_texts(template, titles), titles),
            eos_token=self.tokenizer.eos_token_id,
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
        )

    @cached_property
    def target_class(self) -> dict[int, int]:
        """Item class of every example's target."""
        with self.reading("examples.parquet"):
            examples = self.table("examples.parquet")
            targets = self.classes(examples["target_item_id"].to_pylist())
            return dict(zip(examples["example_id"].to_pylist(), targets, strict=True))

    @cached_property
    def prompts(self) -> dict[int, np.ndarray]:
        """Tokens of every example's prompt, int32, cut to the last 512 as the published code does."""
        with self.reading("examples.parquet"):
            examples = self.table("examples.parquet")
            tokens = encode_prompts(self.tokenizer, examples["prompt"].to_pylist()).last(MAX_PROMPT_TOKENS)
            return {example: tokens[row] for row, example in enumerate(examples["example_id"].to_pylist())}
