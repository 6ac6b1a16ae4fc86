"""The last decoder layer without what nobody asks for: no layer comes behind it, so tokens without a target, such as
most of a prompt, only have to give keys and values.

They get no MLP, and on the CPU no attention where they fill a run of it; the projections of attention stay whole.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from learner.lean_layers import LeanGatedMlp
from learner.products import padded_index
from learner.tree_mask import TreeMask

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def use_last_layer(lm: PreTrainedModel) -> None:
    """Make a model's last layer a LastLayer, in place, where it puts its parts together as that does.

    The model's attention is "tree"; parameters and their names stay.
    """
    layers = getattr(lm.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or isinstance(layers[-1], LastLayer) or not _has_the_parts(layers[-1]):
        return
    last, plain = layers[-1], type(layers[-1])
    expected = _probe(last)
    last.__class__ = _limited_class(plain)  # type: ignore[arg-type]
    if expected is None or expected != _probe(last):
        last.__class__ = plain


def _has_the_parts(layer: nn.Module) -> bool:
    own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return (
        not own
        and {name for name, _ in layer.named_children()} == PARTS
        and LeanGatedMlp.fits(layer.get_submodule("mlp"))
    )


def _probe(layer: nn.Module) -> tuple[list[float], dict[str, str]] | None:
    """What a layer with stand-ins for its parts makes of some hidden states, and what attention is given besides.

    None for a layer that cannot be asked like Llama's.
    """
    attention = _StandIn(lambda states: (states.sin(), None))
    others = {"input_layernorm": lambda x: 2 * x + 1, "post_attention_layernorm": torch.exp, "mlp": torch.cos}
    stand_ins = {"self_attn": attention, **{name: _StandIn(function) for name, function in others.items()}}
    rows = torch.tensor([1, 2])
    tree = TreeMask(torch.full((4,), 4), torch.arange(4), rows)
    names = ("attention_mask", "position_ids", "past_key_values", "position_embeddings")
    states = torch.linspace(-1.0, 1.0, 12).view(1, 4, 3)
    own = dict(layer.named_children())
    layer._modules.update(stand_ins)
    try:
        output = type(layer).forward(layer, states, **{name: name for name in names}, use_cache=False, tree=tree)
        found = output if output.shape[1] == len(rows) else output[:, rows]
    except Exception:  # whatever a layer of another kind may raise: it is left as it is
        return None
    finally:
        layer._modules.update(own)
    return found.flatten().tolist(), {
        name: repr(value) for name, value in attention.arguments.items() if name != "tree"
    }


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
        hidden_states = (hidden_states + attended).index_select(1, padded_index(tree.rows, hidden_states.dtype))
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states[:, : len(tree.rows)]
