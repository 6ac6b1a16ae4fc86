"""The arithmetic that a forward pass needs at least, to hold against the seconds that it takes."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from learner.packing import PackedBatch


@dataclass
class Work:
    """What goes through a model, whose last layer needs more than keys and values for `logit_rows` alone."""

    tokens: int = 0
    attended: int = 0
    """Sum over the tokens of how many tokens each sees."""
    logit_rows: int = 0
    """Tokens whose logits are computed."""
    attended_by_rows: int = 0
    """`attended` of these alone."""


def packed_work(batches: Iterable[PackedBatch]) -> Work:
    """A forward pass of the policy over tree-packed batches, padding left out."""
    work = Work()
    for batch in batches:
        position = batch.positions[0]
        work.tokens += batch.fed_tokens
        work.attended += int(position.sum()) + batch.fed_tokens
        work.logit_rows += len(batch.rows)
        work.attended_by_rows += int(position[batch.rows].sum()) + len(batch.rows)
    return work


class Arithmetic:
    """Floating-point operations of a decoder: 2 per weight of its matrices and token, 4 per value of attention."""

    def __init__(self, model_path: Path) -> None:
        config = AutoConfig.from_pretrained(model_path)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._layers = config.num_hidden_layers
        self._keys_and_values = config.hidden_size * head * 2 * config.num_key_value_heads
        self._rest = config.hidden_size * (head * 2 * config.num_attention_heads + 3 * config.intermediate_size)
        self._attended_values = config.num_attention_heads * head
        self._vocabulary = config.hidden_size * config.vocab_size

    def forward(self, work: Work) -> float:
        """Of one pass."""
        before = self._layers - 1
        weights = self._layers * self._keys_and_values * work.tokens
        weights += self._rest * (before * work.tokens + work.logit_rows) + self._vocabulary * work.logit_rows
        attended = before * work.attended + work.attended_by_rows
        return 2.0 * weights + 4.0 * self._attended_values * attended
