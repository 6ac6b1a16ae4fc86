"""Log-probabilities over the vocabulary, without ever holding more logits than a budget allows."""

from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from learner.products import linear, padded_rows, weight_gradient, widened
from rollout.logsumexp import logsumexp

_ON_CPU, _ON_CUDA = 1 << 19, 1 << 25
# Float32 logits that exist at once.
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Largest difference between two ways to the logits of one model, relative to the largest."""


class LogprobHead(nn.Module):
    """The vocabulary projection, the log-softmax and the choice of targets in one.

    >>> head = LogprobHead(lm.get_output_embeddings(), lm.config, chunk_mib=256)
    >>> logp = head(hidden, batch.edge_row, batch.edge_target, batch.row_edges)
    """

    def __init__(self, projection: nn.Module, config: PretrainedConfig, chunk_mib: float) -> None:
        super().__init__()
        self._projection = (projection,)  # in a tuple, because its weights belong to the language model
        self.scale, self.softcap = logit_transform(config)
        self._chunk_bytes = chunk_mib * 2**20

    def forward(
        self, hidden: torch.Tensor, edge_row: torch.Tensor, edge_target: torch.Tensor, row_edges: np.ndarray
    ) -> torch.Tensor:
        """float32 [E]: the log-probability of edge_target after the token of hidden[edge_row].

        hidden: [K, D]. edge_row, edge_target: int64 [E], distinct pairs, edge_row ascending. row_edges: int64 [K + 1],
        see PackedBatch; on the host, so that nothing waits for the device.
        """
        return _VocabularyLogprobs.apply(hidden, *self.weights(), edge_row, edge_target, row_edges, self)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [V, D] and bias [V] of the projection."""
        return cast(torch.Tensor, self._projection[0].weight), getattr(self._projection[0], "bias", None)

    def chunk_rows(self, weight: torch.Tensor) -> int:
        """Rows that are projected onto the vocabulary at once. weight: [V, D], in the precision of the product."""
        return max(1, int(self._chunk_bytes / (len(weight) * weight.element_size())))

    def transform(self, projected: torch.Tensor) -> torch.Tensor:
        """Logits in float32 from the projection's output."""
        logits = projected.float() * self.scale if self.scale != 1.0 else projected.float()
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def transform_slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """Derivative of `transform`, given its result."""
        return self.scale if self.softcap is None else self.scale * (1.0 - (logits / self.softcap) ** 2)


@torch.no_grad()
def check_head(lm: PreTrainedModel, head: LogprobHead) -> None:
    """Raise NotImplementedError where a model does more to its logits than `head` knows of, or hides its decoder."""
    tokens = torch.arange(8, device=lm.device)[None] % lm.config.get_text_config().vocab_size
    if lm.base_model is lm:
        raise NotImplementedError(
            f"{type(lm).__name__} has no decoder under the name of its base_model_prefix ({lm.base_model_prefix!r}), "
            "so that its hidden states cannot be had without logits"
        )
    training = lm.training
    lm.eval()
    hidden = lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    expected = lm(input_ids=tokens, use_cache=False).logits.float()
    lm.train(training)
    found = head.transform(nn.functional.linear(hidden, *head.weights()))
    tolerance = HEAD_TOLERANCE[hidden.dtype] * float(expected.abs().max() + 1.0)
    difference = float((found - expected).abs().max())
    if not difference <= tolerance:
        raise NotImplementedError(
            f"{type(lm).__name__} computes logits that differ from its output embedding times its hidden states (by "
            f"{difference:.3g}): its multiplier or cap has a name that learner/logprobs.py does not know"
        )


def logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """(scale, softcap): logits are scale * projection, or softcap * tanh(scale * projection / softcap)."""
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "logits_scaling", None) or 1.0
    if config.model_type.startswith("granite"):  # Granite divides by it, Cohere and others multiply
        scale = 1.0 / scale
    return scale, getattr(config, "final_logit_softcapping", None)


class _VocabularyLogprobs(torch.autograd.Function):
    """One chunk of projections exists at a time; a lone one is kept for the backward pass, several are computed anew.

    Float32 logits exist only piece by piece, so that a bfloat16 model never holds them whole and the CPU works in its
    cache; the gradient of the projections takes their place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        edge_row: torch.Tensor,
        edge_target: torch.Tensor,
        row_edges: np.ndarray,
        head: LogprobHead,
    ) -> torch.Tensor:
        ctx.rows, hidden = len(hidden), padded_rows(hidden)  # here, because padding projections would copy them
        normalizer = hidden.new_empty(len(hidden), dtype=torch.float32)
        logp = hidden.new_empty(len(edge_row), dtype=torch.float32)
        wide, wide_bias = widened(weight), None if bias is None else widened(bias)
        chunks = _chunks(row_edges, hidden, wide, head)
        for rows, pieces in chunks:
            projected = linear(hidden[rows].to(wide.dtype), wide, wide_bias)
            for piece, edges in pieces:
                logits = head.transform(projected[piece.start - rows.start : piece.stop - rows.start])
                normalizer[piece] = logsumexp(logits)
                logp[edges] = logits[edge_row[edges] - piece.start, edge_target[edges]]
        ctx.save_for_backward(hidden, normalizer, edge_row, edge_target)
        ctx.head, ctx.row_edges = head, row_edges
        ctx.weights = weight, bias  # not saved tensors: ZeRO-3 swaps a parameter's storage
        ctx.projected = projected if len(chunks) == 1 and any(ctx.needs_input_grad) else None
        return logp - normalizer[edge_row]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        hidden, normalizer, edge_row, edge_target = ctx.saved_tensors
        head, (weight, bias) = ctx.head, ctx.weights
        per_row = torch.zeros_like(normalizer).index_add_(0, edge_row, gradient)
        wide, wide_bias = widened(weight), None if bias is None else widened(bias)
        to_hidden = torch.empty_like(hidden)
        to_weight = None
        to_bias = torch.zeros_like(wide_bias) if wide_bias is not None and ctx.needs_input_grad[2] else None
        for rows, pieces in _chunks(ctx.row_edges, hidden, wide, head):
            states = hidden[rows].to(wide.dtype)
            projected, ctx.projected = ctx.projected, None
            if projected is None:
                projected = linear(states, wide, wide_bias)
            for piece, edges in pieces:
                part = projected[piece.start - rows.start : piece.stop - rows.start]
                logits = head.transform(part)
                slope = head.transform_slope(logits)
                to_logits = logits.sub_(normalizer[piece, None]).exp_().mul_(-per_row[piece, None])
                to_logits[edge_row[edges] - piece.start, edge_target[edges]] += gradient[edges]
                part.copy_(to_logits.mul_(slope))
            to_hidden[rows] = linear(projected, wide.T).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                to_weight = weight_gradient(projected, states, to_weight)
            if to_bias is not None:
                to_bias += projected.sum(0)
        return to_hidden[: ctx.rows], to_weight, to_bias, None, None, None, None


Pieces = list[tuple[slice, slice]]
"""Slices of rows and, edges being ordered by row, of their edges."""


def _chunks(
    row_edges: np.ndarray, hidden: torch.Tensor, weight: torch.Tensor, head: LogprobHead
) -> list[tuple[slice, Pieces]]:
    """Rows that are projected at once, and the pieces of each whose float32 logits exist at once.

    Rows of padding behind those of row_edges have no edges.
    """
    last, piece_rows = len(row_edges) - 1, max(1, (_ON_CUDA if hidden.is_cuda else _ON_CPU) // len(weight))

    def edges(rows: slice) -> slice:
        return slice(int(row_edges[min(rows.start, last)]), int(row_edges[min(rows.stop, last)]))

    return [
        (chunk, [(piece, edges(piece)) for piece in _slices(chunk.start, chunk.stop, piece_rows)])
        for chunk in _slices(0, len(hidden), head.chunk_rows(weight))
    ]


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
