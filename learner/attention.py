"""Attention over a packed row: an attention implementation named "tree" that Hugging Face models call in every layer.

On the CPU the row is cut into runs of queries that see few keys besides their own, one fused attention call each. On
CUDA it is one flex attention call whose block mask skips what nobody sees. Windows go by position, not by index.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from learner.products import widened
from learner.tree_mask import TreeMask

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
    output = _run_attention(
        widened(query), widened(key), widened(value), tree, sliding_window, scaling, dropout, softcap
    )
    return output.to(query.dtype), None


def _run_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: TreeMask,
    window: int | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """[1, N, H, D]: one attention call per run.

    The query heads that share a key head go into the batch dimension, so that keys are shared without a copy.
    """
    runs = tree.runs(window, query.dtype)
    sizes = [run.stop - run.start for run, _ in runs]
    index_of = {run.start: index for index, (run, _) in enumerate(runs)}
    queries = query[0].unflatten(0, (key.shape[1], -1)).transpose(0, 1).split(sizes, 2)
    keys, values = key.split(sizes, 2), value.split(sizes, 2)
    sharing = query.shape[1] // key.shape[1]
    outputs = []
    for index, (run, mask) in enumerate(runs):
        seen = [*(index_of[start] for start, _ in run.ancestors), index]
        run_keys, run_values = (
            torch.cat([parts[other] for other in seen], 2) if len(seen) > 1 else parts[index]
            for parts in (keys, values)
        )
        run_keys, run_values = (part.expand(sharing, -1, -1, -1) for part in (run_keys, run_values))
        outputs.append(_attend(queries[index], run_keys, run_values, mask, scaling, dropout, softcap))
    return torch.cat(outputs, 2).transpose(0, 1).flatten(0, 1).transpose(0, 1)[None]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = (torch.tanh(scores / softcap) * softcap + mask).softmax(-1, torch.float32).to(value.dtype)
    return nn.functional.dropout(weights, dropout) @ value


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
