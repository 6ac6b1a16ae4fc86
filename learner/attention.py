"""Attention over a packed row: an attention implementation named "tree" that Hugging Face models call in every layer.

On the CPU the row is cut into runs of queries that see few keys besides their own; runs of similar size are one fused
attention call. On CUDA it is one flex attention call whose block mask skips what nobody sees. Windows go by position,
not by index.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from learner.products import attended_dtype
from learner.tree_mask import RunBatch, TreeMask

IMPLEMENTATION = "tree"
FLEX_VARIANTS = 64
# Compilations of flex attention, for windows, gradients and lengths; beyond them torch would compute all scores.


def tree_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree: TreeMask | None = None,
    **unsupported: Any,
) -> tuple[torch.Tensor, None]:
    """Hugging Face's attention interface: query [1, H, N, D], key and value [1, H_kv, N, D] -> [1, N, H, D].

    Raises NotImplementedError for a model that does not hand on `tree` or asks for what a tree cannot have.
    """
    asked = sorted(name for name in ("s_aux", "position_bias", "cache") if unsupported.get(name) is not None)
    if tree is None or asked:
        reason = f"needs {asked}" if asked else "does not hand keyword arguments on to its attention"
        raise NotImplementedError(f"{type(module).__name__} {reason}: train it with learner.packing=padded")
    if query.is_cuda:
        if dropout:
            raise NotImplementedError("flex attention has no dropout: train with learner.packing=padded")
        return flex_tree_attention(query, key, value, tree.block_mask(sliding_window), scaling, softcap), None
    batches = tree.run_batches(sliding_window, query.shape[1] // key.shape[1], attended_dtype(query))
    if dropout or softcap is not None:
        return _plain_attention(query, key, value, batches, scaling, dropout, softcap), None
    return _RunAttention.apply(query, key, value, batches, scaling), None


def flex_tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: BlockMask,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """query [1, H, N, D], key and value [1, H_kv, N, D] -> [1, N, H, D], N a multiple of tree_mask.BLOCK."""

    def capped(score: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
        return score if softcap is None else torch.tanh(score / softcap) * softcap

    output = _compiled_flex_attention()(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=blocks,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous()


@cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    """Hugging Face's own call copies keys for every query head where the number of heads is no power of two."""
    torch._dynamo.config.recompile_limit = max(FLEX_VARIANTS, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention)


class _RunAttention(torch.autograd.Function):
    """Fused attention, one call per batch of runs; gradients of keys that several runs see add up in place."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        batches: list[RunBatch],
        scaling: float | None,
    ) -> torch.Tensor:
        """query [1, H, N, D], key and value [1, H_kv, N, D] -> [1, N, H, D]."""
        output = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        queries, keys, values = (rows[0].transpose(0, 1) for rows in (query, key, value))
        normalisers = []
        for batch in batches:
            part, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _queries(queries, batch, key.shape[1]),
                _keys(keys, batch),
                _keys(values, batch),
                attn_mask=batch.mask,
                scale=scaling,
            )
            output.index_copy_(0, batch.token, _rows(part, batch, query.shape[1]).to(output.dtype))
            normalisers.append(normaliser)
        ctx.save_for_backward(query, key, value, output)
        ctx.batches, ctx.normalisers, ctx.scaling = batches, normalisers, scaling
        return output[None]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        queries, keys, values = (rows[0].transpose(0, 1) for rows in (query, key, value))
        incoming, to_query = gradients[0][0], torch.empty_like(output)
        to_key, to_value = (key.new_zeros(len(keys), keys[0].numel(), dtype=attended_dtype(key)) for _ in range(2))
        for batch, normaliser in zip(ctx.batches, ctx.normalisers, strict=True):
            of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _queries(incoming, batch, key.shape[1]),
                _queries(queries, batch, key.shape[1]),
                _keys(keys, batch),
                _keys(values, batch),
                _queries(output, batch, key.shape[1]),
                normaliser,
                0.0,
                False,
                attn_mask=batch.mask,
                scale=ctx.scaling,
            )
            to_query.index_copy_(0, batch.token, _rows(of_query, batch, query.shape[1]).to(to_query.dtype))
            place = batch.key[:, None].expand(-1, to_key.shape[1])
            to_key.scatter_add_(0, place, of_key.transpose(1, 2).reshape(place.shape))
            to_value.scatter_add_(0, place, of_value.transpose(1, 2).reshape(place.shape))
        by_head = (to_query, to_key.view(keys.shape), to_value.view(values.shape))
        return *(rows.transpose(0, 1)[None].to(query.dtype) for rows in by_head), None, None


def _queries(rows: torch.Tensor, batch: RunBatch, key_heads: int) -> torch.Tensor:
    """[B, H_kv, sharing * Q, D] of rows [N, H, D], 0 where there is no query: heads of one key head are neighbours."""
    taken = rows.index_select(0, batch.query).to(batch.mask.dtype).index_fill(0, batch.padding, 0.0)
    return taken.unflatten(1, (key_heads, -1)).unflatten(0, (len(batch.mask), -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _rows(part: torch.Tensor, batch: RunBatch, heads: int) -> torch.Tensor:
    """[R, H, D], one row for each of batch.token: the way back."""
    by_head = part.unflatten(2, (heads // part.shape[1], -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return by_head.flatten(0, 1).index_select(0, batch.real)


def _keys(rows: torch.Tensor, batch: RunBatch) -> torch.Tensor:
    """[B, H_kv, K, D] of keys (or values) [N, H_kv, D]."""
    return rows.index_select(0, batch.key).to(batch.mask.dtype).unflatten(0, (len(batch.mask), -1)).transpose(1, 2)


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batches: list[RunBatch],
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """As _RunAttention, for what fused attention leaves out: a softcap, dropout."""
    queries, keys, values = (rows[0].transpose(0, 1) for rows in (query, key, value))
    output = torch.zeros_like(queries)
    for batch in batches:
        scores = _queries(queries, batch, key.shape[1]) @ _keys(keys, batch).transpose(-1, -2)
        scores = scores * (scaling or query.shape[-1] ** -0.5)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = (scores + batch.mask).softmax(-1, torch.float32).to(batch.mask.dtype)
        part = nn.functional.dropout(weights, dropout) @ _keys(values, batch)
        output = output.index_copy(0, batch.token, _rows(part, batch, query.shape[1]).to(output.dtype))
    return output[None]


def packing_refusal(lm: PreTrainedModel) -> str | None:
    """Why this model cannot be fed a packed tree, or None when it can."""
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if lm._is_stateful or kinds - {"full_attention", "sliding_attention"}:
        return f"its layers carry state from token to token ({', '.join(sorted(kinds))})"
    if not lm._supports_attention_backend:
        return "its attention does not go through the exchangeable attention interface"
    if getattr(config, "v_head_dim", None) not in (None, getattr(config, "qk_head_dim", None)):
        return "its keys and values have heads of different sizes"
    if any(name.endswith("sinks") for name, _ in lm.named_parameters()):
        return "it has attention sinks"
    return None


AttentionInterface.register(IMPLEMENTATION, tree_attention)
