"""The last decoder layer, computed for the tokens that have a target alone: of the others, which are most of a prompt,
it only has to give keys and values, since no layer comes behind it.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from learner.lean_layers import LeanGatedMlp
from learner.tree_mask import TreeMask

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def use_last_layer(lm: PreTrainedModel) -> None:
    """Make a model's last layer a LastLayer, in place, where it puts its parts together as that does.

    The model's attention is "tree"; parameters and their names stay.
    """
    layers = getattr(lm.base_model, "layers", None)
    last = layers[-1] if layers else None
    if last is None or {name for name, _ in last.named_children()} != PARTS or not LeanGatedMlp.fits(last.mlp):
        return
    plain = type(last)
    expected = _probe(last)
    last.__class__ = _limited_class(plain)  # type: ignore[arg-type]
    if expected is None or expected != _probe(last):
        last.__class__ = plain


def _probe(layer: nn.Module) -> tuple[list[float], dict[str, Any]] | None:
    """What a layer with stand-ins for its parts makes of some hidden states, and what attention is given besides.

    None for a layer that wants other arguments than Llama's.
    """
    attention = _StandIn(lambda states: (states.sin(), None))
    others = {"input_layernorm": lambda x: 2 * x + 1, "post_attention_layernorm": torch.exp, "mlp": torch.cos}
    stand_ins = {"self_attn": attention, **{name: _StandIn(function) for name, function in others.items()}}
    rows = torch.tensor([1, 2])
    tree = TreeMask(torch.full((4,), 4), torch.arange(4), rows)
    names = ("attention_mask", "position_ids", "past_key_values", "position_embeddings")
    own = dict(layer.named_children())
    try:
        layer._modules.update(stand_ins)
        states = torch.linspace(-1.0, 1.0, 12).view(1, 4, 3)
        output = type(layer).forward(layer, states, **{name: name for name in names}, use_cache=False, tree=tree)
    except (TypeError, ValueError):
        return None
    finally:
        layer._modules.update(own)
    found = output if output.shape[1] == len(rows) else output[:, rows]
    return found.flatten().tolist(), {name: value for name, value in attention.arguments.items() if name != "tree"}


class _StandIn(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self._function = function
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> Any:
        self.arguments = arguments
        return self._function(hidden_states)


@cache
def _limited_class(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Last{plain.__name__}", (LastLayer, plain), {})


class LastLayer(nn.Module):
    """A decoder layer of attention and a gated MLP behind a norm each."""

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **others: Any) -> torch.Tensor:
        """[1, N, D] -> [1, K, D], those of the tree's rows; where there are none, as any layer."""
        tree = others.get("tree")
        if tree is None or tree.rows is None or arguments:
            return super().forward(hidden_states, *arguments, **others)
        states = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=states, **{**others, "tree": tree.of_rows()})
        hidden_states = (hidden_states + attended).index_select(1, tree.rows)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
