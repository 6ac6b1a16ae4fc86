"""Attention over a packed row: an attention implementation named "tree" that Hugging Face models call in every layer.

On the CPU the row is cut into runs of queries that see few keys besides their own, one fused attention call each. On
CUDA it is one flex attention call whose block mask skips what nobody sees. Windows go by position, not by index.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from learner.products import widened
from learner.tree_mask import Run, TreeMask

IMPLEMENTATION = "tree"


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
        from transformers.integrations.flex_attention import flex_attention_forward

        blocks = tree.block_mask(sliding_window)
        output, _ = flex_attention_forward(
            module, query, key, value, blocks, scaling=scaling, softcap=softcap, dropout=dropout
        )
        return output, None
    wide = widened(query), widened(key), widened(value)
    runs = tree.runs(sliding_window, wide[0].dtype)
    if dropout or softcap is not None:
        output = _plain_attention(*wide, runs, scaling, dropout, softcap)
    else:
        output = _RunAttention.apply(*wide, runs, scaling)
    return output.to(query.dtype), None


class _RunAttention(torch.autograd.Function):
    """Fused attention, one call per run; gradients of keys that several runs see add up in place.

    The query heads that share a key head go into the batch dimension, so that keys are shared without a copy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        runs: list[tuple[Run, torch.Tensor | None]],
        scaling: float | None,
    ) -> torch.Tensor:
        """query [1, H, N, D], key and value [1, H_kv, N, D] -> [1, N, H, D]."""
        output = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        queries, outputs = (_by_key_head(rows, key.shape[1]) for rows in (query[0].transpose(0, 1), output))
        sharing, normalisers = len(queries), []
        for run, mask in runs:
            rows = slice(run.start, run.stop)
            outputs[:, :, rows], normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries[:, :, rows],
                _seen(key, run, sharing),
                _seen(value, run, sharing),
                0.0,
                mask is None,
                attn_mask=mask,
                scale=scaling,
            )
            normalisers.append(normaliser)
        ctx.save_for_backward(query, key, value, output)
        ctx.runs, ctx.normalisers, ctx.scaling = runs, normalisers, scaling
        return output[None]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        gradient, to_query = gradients[0][0], torch.empty_like(output)
        to_key, to_value = torch.zeros_like(key), torch.zeros_like(value)
        by_head = (query[0].transpose(0, 1), output, gradient, to_query)
        queries, outputs, incoming, outgoing = (_by_key_head(rows, key.shape[1]) for rows in by_head)
        for (run, mask), normaliser in zip(ctx.runs, ctx.normalisers, strict=True):
            rows = slice(run.start, run.stop)
            outgoing[:, :, rows], of_key, of_value = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    incoming[:, :, rows],
                    queries[:, :, rows],
                    _seen(key, run, len(queries)),
                    _seen(value, run, len(queries)),
                    outputs[:, :, rows],
                    normaliser,
                    0.0,
                    mask is None,
                    attn_mask=mask,
                    scale=ctx.scaling,
                )
            )
            for whole, part in ((to_key, of_key), (to_value, of_value)):
                pieces = part.sum(0).split([stop - start for start, stop in run.keys], 1)
                for (start, stop), piece in zip(run.keys, pieces, strict=True):
                    whole[0, :, start:stop] += piece
        return to_query.transpose(0, 1)[None], to_key, to_value, None, None


def _by_key_head(rows: torch.Tensor, key_heads: int) -> torch.Tensor:
    """A view [H / H_kv, H_kv, N, D] of rows [N, H, D]."""
    return rows.unflatten(1, (key_heads, -1)).permute(2, 1, 0, 3)


def _seen(keys: torch.Tensor, run: Run, sharing: int) -> torch.Tensor:
    """[sharing, H_kv, seen, D] of keys (or values) [1, H_kv, N, D]: those that a run sees."""
    parts = [keys[:, :, start:stop] for start, stop in run.keys]
    return (torch.cat(parts, 2) if len(parts) > 1 else parts[0]).expand(sharing, -1, -1, -1)


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: list[tuple[Run, torch.Tensor | None]],
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """As _RunAttention, for what fused attention leaves out: a softcap, dropout."""
    queries, scale = _by_key_head(query[0].transpose(0, 1), key.shape[1]), scaling or query.shape[-1] ** -0.5
    outputs = []
    for run, mask in runs:
        scores = queries[:, :, run.start : run.stop] @ _seen(key, run, len(queries)).transpose(-1, -2) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is None:
            mask = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu(1)
        weights = (scores + mask).softmax(-1, torch.float32).to(value.dtype)
        outputs.append(nn.functional.dropout(weights, dropout) @ _seen(value, run, len(queries)))
    return torch.cat(outputs, 2).transpose(0, 1).flatten(0, 1).transpose(0, 1)[None]


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
    if any(name.endswith("sinks") for name, _ in lm.named_parameters()):
        return "it has attention sinks"
    return None


AttentionInterface.register(IMPLEMENTATION, tree_attention)
