"""The last decoder layer, computed for the last token of every row alone: of a prompt's other tokens it only has to
keep keys and values, since no layer comes behind it.

That is one layer of SmolLM2's thirty, and one of the two of a model that is tried out on a laptop.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

KNOWN = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""Layers of vLLM that add attention's output to the residual in `post_attention_layernorm`, and go on row by row."""


class LastLayer:
    """Of a vLLM model that computes each layer as Python, as on CPUs: compiled layers know no hooks.

    >>> layer = LastLayer.of(model)                              # None where its layers are not KNOWN
    >>> metadata[layer.name] = ...                               # attention of one query a row
    >>> with layer.only(tokens): hidden = model(...)             # [K, H]
    """

    def __init__(self, name: str, attention: nn.Module, norm: nn.Module) -> None:
        """name: by which attention finds its metadata. norm: behind attention, of its output and the residual."""
        self.name = name
        self._tokens: torch.Tensor | None = None
        attention.register_forward_pre_hook(self._some_queries)
        norm.register_forward_pre_hook(self._some_residuals)

    @classmethod
    def of(cls, model: Any) -> "LastLayer | None":
        """The last layer of a causal language model of vLLM, if that is one of KNOWN."""
        layers = getattr(getattr(model, "model", None), "layers", None)
        if not layers or type(layers[-1]).__name__ not in KNOWN:
            return None
        attention = layers[-1].self_attn.attn
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
        query, *key_and_value = inputs
        return inputs if self._tokens is None else (query[self._tokens], *key_and_value)

    def _some_residuals(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, residual = inputs
        return inputs if self._tokens is None else (hidden, residual[self._tokens])
