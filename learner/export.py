"""Whole weights of the policy under their Hugging Face names, whatever ZeRO stage holds them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from catalog.atomic import CannotWrite
from learner.engine import ZeroEngine
from learner.lora import Adapted, merged_parameters
from rollout.weights import WeightBucket, checksum

BUCKET_BYTES = 64 * 2**20


def named_weights(
    engine: ZeroEngine, model: nn.Module, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[list[tuple[str, Tensor]]]:
    """Buckets of (name, whole weight): adapters merged, tied weights once. All ranks must exhaust it together.

    Under ZeRO-3 the tensors of a bucket are valid only until the next one is asked for.
    """
    bucket, size = [], 0
    for entry in merged_parameters(model):
        bucket.append(entry)
        size += engine.full_bytes(entry[1])
        if size >= bucket_bytes:
            yield from _gathered(engine, bucket)
            bucket, size = [], 0
    if bucket:
        yield from _gathered(engine, bucket)


def named_as_saved(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Weights as Hugging Face's files have them, which is what vLLM reads: experts one by one, some names others."""
    from transformers.core_model_loading import revert_weight_conversion

    return list(revert_weight_conversion(model, dict(tensors)).items())


def weight_buckets(engine: ZeroEngine, model: PreTrainedModel) -> Iterator[WeightBucket]:
    """Copies of all weights in buckets, on rank 0; nothing on the other ranks, which must exhaust it too."""
    for tensors in named_weights(engine, model):
        if engine.rank == 0:
            yield WeightBucket.pack(named_as_saved(model, tensors))


def weights_checksum(engine: ZeroEngine, model: PreTrainedModel) -> int:
    """rollout.weights.checksum of all weights; all ranks must call."""
    return checksum(entry for bucket in named_weights(engine, model) for entry in named_as_saved(model, bucket))


def save_huggingface(engine: ZeroEngine, model: PreTrainedModel, tokenizer_path: str, path: Path) -> None:
    """Write a Hugging Face directory (weights, configuration, tokenizer) on rank 0; all ranks must call.

    Raises CannotWrite where the tokenizer is gone.
    """
    weights: dict[str, Tensor] = {}
    for bucket in named_weights(engine, model):
        if engine.rank == 0:
            weights |= {name: tensor.to("cpu", copy=True) for name, tensor in bucket}
    if engine.rank == 0:
        from transformers import AutoTokenizer

        if not Path(tokenizer_path).is_dir():
            raise CannotWrite(
                f"{path}: the tokenizer that belongs to it was in {tokenizer_path}, which is gone (`make clean` "
                "deletes .cache, where small models are): bring it back; a run that goes on makes a small model again"
            )
        model.save_pretrained(path, state_dict=weights)
        AutoTokenizer.from_pretrained(tokenizer_path).save_pretrained(path)
    engine.barrier()


def _gathered(
    engine: ZeroEngine, bucket: list[tuple[str, nn.Parameter, Adapted | None]]
) -> Iterator[list[tuple[str, Tensor]]]:
    needed = [weight for _, parameter, layer in bucket for weight in (parameter, *(layer.parameters if layer else ()))]
    with engine.gathered(needed):
        yield [
            (name, layer.merged(parameter.detach()) if layer else parameter.detach())
            for name, parameter, layer in bucket
        ]
