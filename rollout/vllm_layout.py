"""What the layers of a vLLM worker hold, in terms of Hugging Face's tensors: vLLM fuses and shards them."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch

from rollout.vllm_internals import UnsupportedModelError
from rollout.weights import WeightsError, combine, elements_checksum, tensor_checksum


class HeldWeights:
    """Checksums of what the layers of a model hold, noted while vLLM loads it.

    >>> held = HeldWeights(model, by_place=False)
    >>> held.note("model.layers.0.mlp.down_proj", layer, "weight", tensor)        # and so on for every parameter
    >>> loaded = held.checksum(arrived)
    >>> held.by_place                                                             # for the next load

    Some architectures (GPT-2, GPT-NeoX, mixtures of experts) keep some tensors in another order than Hugging Face, or
    under other names. These are compared with what arrived by their elements, wherever they lie.
    """

    def __init__(self, model: torch.nn.Module, by_place: bool):
        """by_place: every tensor is known to be held in Hugging Face's order; False where that is to be found out.

        A rank of several, as of tensor parallelism, must set it: it holds parts, of which elements alone say nothing.
        """
        self._model = model
        self._sums: dict[str, int] = {}
        self._elements: dict[str, int] = {}
        self.by_place = by_place

    def note(self, module_name: str, layer: Any, name: str, tensor: torch.Tensor) -> None:
        """Sum up a parameter of a layer. Raises UnsupportedModelError where its parts cannot be told."""
        for part in _parts(self._model, f"{module_name}.{name}", layer, tensor):
            place = {"row_offset": part.row, "column_offset": part.column}
            self._sums[part.name] = tensor_checksum(part.name, part.tensor, **place) if part.counted else 0
            if not self.by_place:
                self._elements[part.name] = elements_checksum(part.tensor)

    def checksum(self, arrived: Mapping[str, torch.Tensor]) -> int:
        """This rank's share of rollout.weights.checksum of what is held.

        arrived: what vLLM was given, by Hugging Face name. Raises WeightsError where something is missing or unknown.
        """
        if not self.by_place:
            sums = {name: tensor_checksum(name, self._there(tensor)) for name, tensor in arrived.items()}
            moved = {name for name in sums.keys() | self._sums.keys() if sums.get(name) != self._sums.get(name)}
            self.by_place = not moved
            if moved and self._same_elements(moved, arrived):
                return combine(sums.values())
        if missing_or_unknown := self._sums.keys() ^ arrived.keys():
            raise WeightsError(
                "the weights that arrived are not those that the engine holds: missing "
                f"{sorted(missing_or_unknown - arrived.keys())[:5]}, unknown "
                f"{sorted(missing_or_unknown & arrived.keys())[:5]}; each parameter must come once, under its Hugging "
                "Face name, and with rollout.tensor_parallel > 1 vLLM must keep it under that name, or the model "
                "cannot be trained"
            )
        return combine(self._sums.values())

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        """What has arrived on the host, on the model's device, which sums it up sooner."""
        return tensor.to(next(self._model.parameters()).device, non_blocking=True)

    def _same_elements(self, names: Set[str], arrived: Mapping[str, torch.Tensor]) -> bool:
        """Whether the tensors of these names, ours and Hugging Face's, are made of the same elements."""
        sent = combine(elements_checksum(self._there(arrived[name])) for name in names & arrived.keys())
        return sent == combine(self._elements[name] for name in names & self._sums.keys())


@dataclass(frozen=True)
class _Part:
    """The part of one Hugging Face tensor that one rank holds."""

    name: str
    tensor: torch.Tensor
    row: int = 0
    column: int = 0
    counted: bool = True
    """False for a copy that another rank counts."""


def _parts(model: Any, name: str, layer: Any, tensor: torch.Tensor) -> list[_Part]:
    """Undo vLLM's fusing and sharding: which parts of which Hugging Face tensors a parameter holds."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(layer, VocabParallelEmbedding):
        shard = layer.shard_indices
        return [_Part(name, tensor[: shard.num_org_elements], row=shard.org_vocab_start_index)]
    if isinstance(layer, RowParallelLinear):
        if tensor.dim() == 1:
            return [_Part(name, tensor, counted=layer.tp_rank == 0)]
        return [_Part(name, tensor, column=layer.tp_rank * tensor.shape[1])]
    if isinstance(layer, ColumnParallelLinear):
        prefix, fused, suffix = name.rsplit(".", 2)
        names = getattr(model, "packed_modules_mapping", {}).get(fused, [fused])
        sizes = layer.output_partition_sizes if len(names) > 1 else [len(tensor)]
        fused_in_file = len(names) == 1 and len(getattr(layer, "output_sizes", ())) > 1
        if len(names) != len(sizes) or (fused_in_file and layer.tp_size > 1):
            raise UnsupportedModelError(
                f"{name} fuses {names} into parts of {sizes} rows: what ranks of it hold cannot be told from their "
                "shards; set rollout.tensor_parallel=1"
            )
        parts = []
        for i, (part_name, part) in enumerate(zip(names, tensor.split(sizes), strict=True)):
            replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and i > 0 else 1
            parts.append(
                _Part(
                    f"{prefix}.{part_name}.{suffix}",
                    part,
                    row=layer.tp_rank // replicas * len(part),
                    counted=layer.tp_rank % replicas == 0,
                )
            )
        return parts
    from vllm.distributed import get_tensor_model_parallel_rank

    return [_Part(name, tensor, counted=get_tensor_model_parallel_rank() == 0)]
