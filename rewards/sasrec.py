"""SASRec: a small causal transformer over item classes (Kang and McAuley, arXiv 1808.09781)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from catalog.atomic import atomic_file
from rewards.errors import RewardError
from rewards.group import titles_fingerprint


@dataclass(frozen=True)
class SASRecShape:
    """The shape of the model."""

    num_classes: int
    # Item classes of the catalogue.
    max_history: int = 10
    # Most recent items that it sees.
    hidden: int = 64
    # Hidden size.
    layers: int = 2
    # Number of blocks.
    heads: int = 2
    # Attention heads.
    dropout: float = 0.2
    # Dropout of embeddings and blocks during training.

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.layers < 1 or self.heads < 1 or self.hidden % self.heads:
            raise RewardError(
                f"SASRec: hidden={self.hidden}, layers={self.layers} and heads={self.heads} must be 1 or more, and "
                "hidden a multiple of heads"
            )
        if self.max_history < 1 or not 0 <= self.dropout < 1:
            raise RewardError(
                f"SASRec: max_history={self.max_history} must be 1 or more, and dropout={self.dropout} 0 or more and "
                "below 1"
            )


class SASRec(nn.Module):
    """Scores every item class as the next one after a history.

    >>> model = SASRec(SASRecShape(num_classes=catalog.num_classes))
    >>> model(history)                 # int64 [B, L], padded on the left with model.padding -> float32 [B, classes]
    """

    def __init__(self, shape: SASRecShape) -> None:
        super().__init__()
        self.shape = shape
        self.padding = shape.num_classes
        self.item = nn.Embedding(shape.num_classes + 1, shape.hidden, padding_idx=self.padding)
        self.position = nn.Embedding(shape.max_history, shape.hidden)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden)
        self.apply(_initialise)

    def forward(self, history: Tensor) -> Tensor:
        length = history.shape[1]
        real = history != self.padding
        causal = torch.ones(length, length, dtype=torch.bool, device=history.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=history.device)
        mask = (causal & real[:, None, :] | itself)[:, None]  # padding sees itself: a row of no keys would be NaN
        hidden = self.item(history) + self.position.weight[-length:]  # the last position is always the newest item
        hidden = self.dropout(hidden)
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.norm(hidden[:, -1]) @ self.item.weight[:-1].T

    def pad(self, histories: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        """int64 [B, max_history]: the newest items of each history, padded on the left."""
        padded = torch.full((len(histories), self.shape.max_history), self.padding)
        for row, history in enumerate(histories):
            newest = history[-self.shape.max_history :]
            padded[row, self.shape.max_history - len(newest) :] = torch.tensor(newest)
        return padded


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a layer norm."""

    def __init__(self, shape: SASRecShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm_attention = nn.LayerNorm(shape.hidden)
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.out = nn.Linear(shape.hidden, shape.hidden)
        self.norm_feed = nn.LayerNorm(shape.hidden)
        self.up = nn.Linear(shape.hidden, 4 * shape.hidden)
        self.down = nn.Linear(4 * shape.hidden, shape.hidden)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden float32 [B, L, D], mask bool [B, 1, L, L] -> float32 [B, L, D]"""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_attention(hidden)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + self.dropout(self.out(attended.transpose(1, 2).flatten(-2)))
        return hidden + self.dropout(self.down(F.gelu(self.up(self.norm_feed(hidden)))))


def save_sasrec(model: SASRec, file: Path, titles: Sequence[str], metrics: dict[str, float]) -> None:
    """Weights, shape, fingerprint of the titles and metrics in one safetensors file."""
    metadata = {
        "shape": json.dumps(asdict(model.shape)),
        "titles": titles_fingerprint(titles),
        "metrics": json.dumps(metrics),
    }
    with atomic_file(file) as partial:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial, metadata)


def load_sasrec(file: Path, titles: Sequence[str]) -> SASRec:
    """The model in evaluation mode. Raises RewardError for a file that is missing, damaged or of other titles.

    Also for weights that are not finite.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        shape, trained_on = json.loads(metadata["shape"]), metadata["titles"]
        model = SASRec(SASRecShape(**shape))
        model.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"{file} holds no SASRec model ({error}); train one: make sasrec DATA=... OUT={file}"
        ) from error
    if trained_on != titles_fingerprint(titles):
        raise RewardError(
            f"{file} was trained on {model.shape.num_classes} other titles than the {len(titles)} of this catalogue; "
            "train one on this catalogue: make sasrec DATA=... OUT=..."
        )
    for name, tensor in tensors.items():
        check_finite(tensor, f"{file}: {name}")
    return model.eval()


def check_finite(values: Tensor, name: str) -> None:
    """Raise RewardError for what a model that has diverged holds or gives; NaN would rank any target first."""
    if not values.isfinite().all():
        raise RewardError(
            f"{name} of this SASRec model is not finite, since it diverged in training; train one with a lower "
            "learning rate (--lr of rere reward train-sasrec)"
        )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
