"""Low-rank adapters inside a Hugging Face model, and their merged weights."""

from collections.abc import Iterator
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from learner.config import LoraConfig

Model = TypeVar("Model", bound=nn.Module)


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Freeze `model` and put trainable adapters into its linear layers (peft), keeping its class and its forward.

    Raises ValueError naming a target module that is not in the model, is the output head, or has its weight.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    all_linear = config.target_modules == ["all-linear"]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for target in () if all_linear else config.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules()):
            linear = {
                name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
            }
            raise ValueError(
                f"learner.lora.target_modules: no module of the model is called {target!r}; its linear layers are "
                f"{', '.join(sorted(linear))}"
            )
    for name, module in model.named_modules():
        if not any(name == target or name.endswith(f".{target}") for target in config.target_modules):
            continue
        if module is head:
            raise ValueError(
                f"learner.lora.target_modules: {name} is the output head, which takes no adapter; drop it"
            )
        if head is not None and getattr(module, "weight", None) is head.weight:
            raise ValueError(
                f"learner.lora.target_modules: the output head is tied to {name}, so an adapter there would change "
                "it in rollouts but not in training; drop it"
            )
    inject_adapter_in_model(
        PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # only ever a factor
            lora_dropout=config.dropout,
            target_modules="all-linear" if all_linear else list(config.target_modules),
        ),
        model,
    )


def with_own_adapters(model: Model) -> Model:
    """A copy of a model with adapters: they are copied, all other weights are those of `model` itself."""
    copied = adapter_weights(model).keys()
    return deepcopy(model, {id(weight): weight for name, weight in model.named_parameters() if name not in copied})


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all adapters by name; none for a model without."""
    return {name: weight for name, weight in model.named_parameters() if ".lora_" in name}


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, "Adapted | None"]]:
    """(Hugging Face name, weight, its adapted layer or None) of every weight of the model without adapters.

    Tied weights come once. Names are those that the model had before add_adapters.
    """
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        owner, base, rest = name.rpartition(".base_layer.")
        adapted = Adapted(layers[owner]) if base and rest == "weight" else None
        yield (f"{owner}.{rest}" if base else name), parameter, adapted


class Adapted:
    """A linear layer with an adapter."""

    def __init__(self, layer: nn.Module):
        self._layer = layer

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The adapter's own weights."""
        return [parameter for name, parameter in self._layer.named_parameters() if "lora_" in name]

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """weight + scale * B A, summed in float32 and rounded once. [out, in]"""
        (adapter,) = self._layer.active_adapters  # type: ignore[misc]
        return (weight.float() + self._layer.get_delta_weight(adapter).float()).to(weight.dtype)  # type: ignore[operator]
