"""Attention over a packed row: an attention implementation named "tree" that Hugging Face models call in every layer.

On the CPU the row is cut into runs of queries that see few keys besides their own, and attention is computed some runs
at a time, in matrices that stay in the cache: torch's fused kernel takes longer for so few queries. On CUDA it is one
flex attention call whose block mask skips what nobody sees. Windows go by position, not by index.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from learner.products import best_products, compiles_every_length
from learner.tree_mask import RunBatch, TreeMask

IMPLEMENTATION = "tree"


@dataclass(frozen=True)
class Window:
    """In place of the mask of layers with a sliding window."""

    size: int
    """Positions that a query sees, its own included."""


FLEX_VARIANTS = 256
# Compilations of flex attention, for windows, gradients and lengths; beyond them torch refuses to run it.


def tree_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Window | torch.Tensor | None,
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
    if isinstance(attention_mask, torch.Tensor):
        asked.append("attention_mask")
    if tree is None or asked:
        reason = f"needs {asked}" if asked else "does not hand keyword arguments on to its attention"
        raise NotImplementedError(f"{type(module).__name__} {reason}: train it with learner.packing=padded")
    window = attention_mask.size if isinstance(attention_mask, Window) else sliding_window
    if dropout:
        raise NotImplementedError("tree attention has no dropout: train with learner.packing=padded")
    if query.is_cuda:
        return flex_tree_attention(query, key, value, tree.block_mask(window), scaling, softcap), None
    runs = tree.runs(window, query.shape[1], key.shape[1], rounded=compiles_every_length(torch.float32))
    return _RunAttention.apply(query, key, value, runs, tree, scaling or query.shape[-1] ** -0.5, softcap), None


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
        kernel_options=_kernel_options(query) if query.is_cuda else None,
    )
    return output.transpose(1, 2).contiguous()


def _kernel_options(query: torch.Tensor) -> dict[str, int] | None:
    device: Any = torch.cuda.get_device_properties(query.device)
    return flex_kernel_options(query.shape[-1], query.element_size(), device.shared_memory_per_block_optin)


def flex_kernel_options(head_size: int, element_size: int, shared_memory: int) -> dict[str, int] | None:
    """What flex attention's kernels need where torch's own choice is wrong for wide heads; None where it is right.

    Its tiles do not fit, or its 4 warps are too few: a thread then has kilobytes that its registers cannot hold (12 in
    the backward pass of 128 wide heads on a B200).
    shared_memory: bytes that one block of threads can have: 99 KiB on consumer cards, 163 on an A100, 227 on an H100.
    """
    row_bytes, small = (1 << (head_size - 1).bit_length()) * element_size, shared_memory < 150 * 1024
    if row_bytes < 256:
        return None
    if element_size == 4:
        tiles = {"fwd_BLOCK_M": 32, "fwd_num_stages": 1 if small else 2} if row_bytes >= 512 else {}
        return {"fwd_num_warps": 8, "bwd_num_warps": 8, **tiles}
    if row_bytes < 512 or not small:
        return {"bwd_num_warps": 8}
    return {"fwd_num_stages": 1, "bwd_num_stages": 1} | {f"bwd_BLOCK_{tile}": 32 for tile in ("M1", "N1", "M2", "N2")}


@cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    """Hugging Face's own call copies keys for every query head where the number of heads is no power of two."""
    torch._dynamo.config.recompile_limit = max(FLEX_VARIANTS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.specialize_float = True  # a second softcap would become a variable, which kernels cannot have
    return torch.compile(flex_attention, fullgraph=True)


class _RunAttention(torch.autograd.Function):
    """Attention some runs at a time, in float32; the backward pass computes again the weights that are not kept.

    The output is 0 for queries of no run.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        runs: Sequence[RunBatch],
        tree: TreeMask,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """query [1, H, N, D], key and value [1, H_kv, N, D] -> [1, N, H, D]."""
        ctx.save_for_backward(query, key, value)
        ctx.runs, ctx.tree, ctx.scaling, ctx.softcap = runs, tree, scaling, softcap
        ctx.kept, ctx.reserved = {}, 0
        queries, keys, values = _rows(query) * scaling, _rows(key), _rows(value)
        output = torch.zeros_like(queries)
        with best_products(queries):
            for index, run in enumerate(runs):
                own, seen, theirs = run.of_queries(queries), run.of_keys(keys), run.of_keys(values)
                weights, slope = _weights(own, seen, run.mask, softcap)
                size = weights.numel() * (1 if slope is None else 2)
                if any(ctx.needs_input_grad) and tree.reserve(size):
                    ctx.kept[index] = weights, slope
                    ctx.reserved += size
                output.index_copy_(0, run.queries, torch.bmm(weights, theirs).flatten(0, 1))
        return output.view(1, query.shape[2], query.shape[1], -1).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        queries, keys, values = _rows(query) * ctx.scaling, _rows(key), _rows(value)
        incoming = gradients[0].float().reshape(queries.shape)
        to_queries, to_keys, to_values = (torch.zeros_like(rows) for rows in (queries, keys, values))
        with best_products(queries):
            for index, run in enumerate(ctx.runs):
                own, seen, theirs = run.of_queries(queries), run.of_keys(keys), run.of_keys(values)
                of_output = run.of_queries(incoming)
                weights, slope = ctx.kept.pop(index, None) or _weights(own, seen, run.mask, ctx.softcap)
                to_values.index_add_(0, run.keys, torch.bmm(weights.transpose(1, 2), of_output).flatten(0, 1))
                of_scores = torch.bmm(of_output, theirs.transpose(1, 2))
                of_scores = torch.ops.aten._softmax_backward_data(of_scores, weights, -1, weights.dtype)
                if slope is not None:
                    of_scores.mul_(slope)
                to_keys.index_add_(0, run.keys, torch.bmm(of_scores.transpose(1, 2), own).flatten(0, 1))
                to_queries.index_copy_(0, run.queries, torch.bmm(of_scores, seen).flatten(0, 1))
        ctx.tree.reserve(-ctx.reserved)
        ctx.reserved = 0
        to_queries.mul_(ctx.scaling)
        pairs = (to_queries, query), (to_keys, key), (to_values, value)
        return *(_heads(rows, like) for rows, like in pairs), None, None, None, None


def _rows(heads: torch.Tensor) -> torch.Tensor:
    """float32 [N * H, D] of [1, H, N, D]: the heads of a token are neighbours."""
    return heads[0].transpose(0, 1).float().reshape(-1, heads.shape[-1])


def _heads(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What _rows has made its rows of, in the precision and the shape of `like`."""
    _, heads, tokens, _ = like.shape
    return rows.view(1, tokens, heads, -1).transpose(1, 2).to(like.dtype)


def _weights(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention weights [M, Q * sharing, K] of scaled queries [M, Q * sharing, D] and keys [M, K, D], M = R * H_kv.

    Besides, the softcap's derivative. mask: of RunBatch.
    """
    scores, slope = torch.bmm(query, key.transpose(1, 2)), None
    by_run = scores.view(len(mask), -1, mask.shape[2], scores.shape[1] // mask.shape[2], mask.shape[4])
    if softcap is not None:
        scores.div_(softcap).tanh_()
        slope = 1.0 - scores**2
        scores.mul_(softcap)
    by_run.add_(mask)
    return torch.softmax(scores, -1, out=scores), slope


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


def window_of_mask(*arguments: Any, local_size: int | None = None, **others: Any) -> Window | None:
    """Hugging Face's mask interface. Some models name their window only here, and not to their attention."""
    return None if local_size is None else Window(local_size)


AttentionInterface.register(IMPLEMENTATION, tree_attention)
AttentionMaskInterface.register(IMPLEMENTATION, window_of_mask)
