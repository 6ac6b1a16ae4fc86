"""Log-probabilities over the vocabulary, without ever holding the logits of more than a chunk of tokens."""

from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from learner.products import linear, widened

_AT_ONCE = 1 << 19
# Logits whose normaliser is computed at once.
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Largest difference between a model's own logits and LogprobHead's, relative to the largest."""


class LogprobHead(nn.Module):
    """The vocabulary projection, the log-softmax and the choice of targets in one.

    >>> head = LogprobHead(lm.get_output_embeddings(), lm.config, chunk_tokens=1024)
    >>> logp = head(hidden, edge_row, edge_target)
    """

    def __init__(self, projection: nn.Module, config: PretrainedConfig, chunk_tokens: int) -> None:
        super().__init__()
        self._projection = (projection,)  # in a tuple, because its weights belong to the language model
        self.scale, self.softcap = logit_transform(config)
        self.chunk_tokens = chunk_tokens

    def forward(self, hidden: torch.Tensor, edge_row: torch.Tensor, edge_target: torch.Tensor) -> torch.Tensor:
        """float32 [E]: the log-probability of edge_target after the token of hidden[edge_row].

        hidden: [K, D]. edge_row, edge_target: int64 [E], distinct pairs, edge_row ascending.
        """
        return _VocabularyLogprobs.apply(hidden, *self.weights(), edge_row, edge_target, self)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [V, D] and bias [V] of the projection."""
        return cast(torch.Tensor, self._projection[0].weight), getattr(self._projection[0], "bias", None)

    def transform(self, projected: torch.Tensor) -> torch.Tensor:
        """Logits in float32 from the projection's output."""
        logits = projected.float() * self.scale if self.scale != 1.0 else projected.float()
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def transform_slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """Derivative of `transform`, given its result."""
        return self.scale if self.softcap is None else self.scale * (1.0 - (logits / self.softcap) ** 2)


@torch.no_grad()
def check_head(lm: PreTrainedModel, head: LogprobHead) -> None:
    """Raise NotImplementedError where a model does more to its logits than `head` knows of."""
    tokens = torch.arange(8, device=lm.device)[None] % lm.config.get_text_config().vocab_size
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
    """One chunk of logits exists at a time. A lone chunk is kept for the backward pass, several are computed anew."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        edge_row: torch.Tensor,
        edge_target: torch.Tensor,
        head: LogprobHead,
    ) -> torch.Tensor:
        normalizer = hidden.new_empty(len(hidden), dtype=torch.float32)
        logp = hidden.new_empty(len(edge_row), dtype=torch.float32)
        chunks = _chunks(len(hidden), edge_row, head.chunk_tokens)
        wide, wide_bias = widened(weight), None if bias is None else widened(bias)
        for rows, edges in chunks:
            logits = head.transform(linear(hidden[rows].to(wide.dtype), wide, wide_bias))
            normalizer[rows] = _logsumexp(logits)
            logp[edges] = logits[edge_row[edges] - rows.start, edge_target[edges]] - normalizer[edge_row[edges]]
        ctx.save_for_backward(hidden, normalizer, edge_row, edge_target)
        ctx.head, ctx.weights = head, (weight, bias)  # not saved tensors: ZeRO-3 swaps a parameter's storage
        ctx.logits = logits if len(chunks) == 1 and any(ctx.needs_input_grad) else None
        return logp

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        hidden, normalizer, edge_row, edge_target = ctx.saved_tensors
        weight, bias = ctx.weights
        per_row = torch.zeros_like(normalizer).index_add_(0, edge_row, gradient)
        wide, wide_bias = widened(weight), None if bias is None else widened(bias)
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.empty_like(wide) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(wide_bias) if wide_bias is not None and ctx.needs_input_grad[2] else None
        for rows, edges in _chunks(len(hidden), edge_row, ctx.head.chunk_tokens):
            states = hidden[rows].to(wide.dtype)
            logits, ctx.logits = ctx.logits, None
            if logits is None:
                logits = ctx.head.transform(linear(states, wide, wide_bias))
            slope = ctx.head.transform_slope(logits)
            to_logits = logits.sub_(normalizer[rows, None]).exp_().mul_(-per_row[rows, None])
            to_logits[edge_row[edges] - rows.start, edge_target[edges]] += gradient[edges]
            projected = to_logits.mul_(slope).to(wide.dtype)
            to_hidden[rows] = linear(projected, wide.T).to(hidden.dtype)
            if to_weight is not None:
                torch.addmm(to_weight, projected.T, states, beta=float(rows.start > 0), out=to_weight)
            if to_bias is not None:
                to_bias += projected.sum(0)
        return to_hidden, to_weight, to_bias, None, None, None


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """[rows] of finite logits, a few rows at a time: the fused functions would copy all logits.

    On the CPU, torch's log-softmax is one pass over memory where its logsumexp is several.
    """
    parts = logits.split(max(1, _AT_ONCE // logits.shape[1]))
    if logits.is_cuda:
        return torch.cat([part.logsumexp(-1) for part in parts])
    return torch.cat([part[:, 0] - part.log_softmax(-1)[:, 0] for part in parts])


def _chunks(rows: int, edge_row: torch.Tensor, size: int) -> list[tuple[slice, slice]]:
    """Slices of rows and, edges being ordered by row, of their edges."""
    starts = torch.arange(0, rows + size, size, device=edge_row.device)
    bounds = torch.searchsorted(edge_row, starts).tolist()
    return [
        (slice(start, min(start + size, rows)), slice(*edges))
        for start, *edges in zip(range(0, rows, size), bounds[:-1], bounds[1:], strict=False)
    ]
