"""The last decoder layer, computed for the last token of every row alone: of a prompt's other tokens it only has to
keep keys and values, since no layer comes behind it.

That is one layer of SmolLM2's thirty, and one of the two of a model that is tried out on a laptop.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

KNOWN = {
    f"vllm.model_executor.models.{module}.{name}DecoderLayer"
    for module, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
}
"""Layers that add attention's output to the residual in `post_attention_layernorm`, and go on row by row."""


class LastLayerHooks:
    """Makes the last layer of a vLLM model leave rows out.

    >>> hooks = LastLayerHooks.of(runner.model, runner.vllm_config)   # None where that cannot be
    >>> metadata[hooks.layer_name] = ...                              # attention of one query a row
    >>> with hooks.only(tokens): hidden = model(...)                  # [K, H]
    """

    def __init__(self, layer_name: str, attention: nn.Module, norm: nn.Module) -> None:
        """layer_name: under which attention finds its metadata. norm: of attention's output and the residual."""
        self.layer_name = layer_name
        self._tokens: torch.Tensor | None = None
        attention.register_forward_pre_hook(self._some_queries)
        norm.register_forward_pre_hook(self._some_residuals)

    @classmethod
    def of(cls, model: Any, vllm_config: Any) -> "LastLayerHooks | None":
        """Of a causal language model whose last layer is one of KNOWN; compiled layers know no hooks."""
        from vllm.config import CompilationMode

        layers = getattr(getattr(model, "model", None), "layers", None)
        if not layers or vllm_config.compilation_config.mode != CompilationMode.NONE:
            return None
        kind, attention = type(layers[-1]), getattr(getattr(layers[-1], "self_attn", None), "attn", None)
        if attention is None or f"{kind.__module__}.{kind.__name__}" not in KNOWN:
            return None
        return cls(attention.layer_name, attention, layers[-1].post_attention_layernorm)

    @contextmanager
    def only(self, tokens: torch.Tensor) -> Iterator[None]:
        """Within, hidden states are those of `tokens` alone, int64 [K] of the model's input."""
        self._tokens = tokens
        try:
            yield
        finally:
            self._tokens = None

    def _some_queries(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if self._tokens is None:
            return inputs
        query, *key_and_value = inputs
        return (query[self._tokens], *key_and_value)

    def _some_residuals(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if self._tokens is None:
            return inputs
        hidden, residual = inputs
        return hidden, residual[self._tokens]
