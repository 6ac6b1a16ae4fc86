"""New weights into a running vLLM worker, and the checksum of what it then really holds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rollout.finite import REMEDY
from rollout.host_memory import WORTH_RETURNING, return_freed_memory
from rollout.vllm_internals import LOADING_NAMES, OTHER_VLLM, WORKER_NAMES, check_names, unlink_shared_memory
from rollout.vllm_layout import HeldWeights
from rollout.vllm_sleep import SleepWorker
from rollout.weights import WeightBucket, WeightsError

PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""Largest difference between a packed matrix product and the plain one, relative to the largest output."""


class WeightsWorker(SleepWorker):
    """Methods that vLLM adds to its worker class: loading weights and saying what was loaded.

    >>> llm = create_llm(model_path, config, worker_extension="rollout.vllm_weights.WeightsWorker")
    >>> loaded = combine(call_workers(llm, "load_bucket_weights", buckets))
    """

    model_config: Any
    vllm_config: Any
    _by_place = False

    def check_internals(self) -> None:
        """Raise UnsupportedModelError where vLLM's worker lacks what loading weights or sleep needs."""
        check_names(self, WORKER_NAMES, OTHER_VLLM)
        check_names(self.model_runner, LOADING_NAMES, OTHER_VLLM)

    def unlink_shared_memory(self) -> None:
        """See rollout.vllm_internals.unlink_shared_memory."""
        unlink_shared_memory()

    def load_bucket_weights(self, buckets: Sequence[WeightBucket]) -> int:
        """Replace all weights, waking a worker that sleeps; this rank's share of the checksum of what it then holds.

        vLLM fuses matrices, shards them and, on CPU, packs them into a form that cannot be read back. So the checksum
        is taken of what each layer holds after vLLM's own loaders have run, immediately before a matrix is packed, and
        the packed matrix must then multiply a probe as the plain one does.
        """
        from vllm.config import set_current_vllm_config

        model = self.model_runner.model
        tensors = dict(named for bucket in buckets for named in bucket.tensors())
        _check_dtype(tensors, self.model_config.dtype)
        self.wake("weights")
        one_rank = self.vllm_config.parallel_config.tensor_parallel_size == 1
        held = HeldWeights(model, by_place=self._by_place or not one_rank)
        faults: list[str] = []  # raised when vLLM is done: a load that ends halfway leaves no way to load again
        with torch.no_grad(), set_current_vllm_config(self.vllm_config), _watch_packing(model, held, faults):
            _reload(model, self.model_config, tensors, faults)
        if faults:
            raise WeightsError(faults[0])
        tied_copy, _ = _tied(model)
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.numel() and module is not tied_copy:
                    held.note(module_name, module, name, parameter)
        checksum = held.checksum(tensors)
        self._by_place = held.by_place
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if self.model_runner.device.type == "cpu" and self.weight_bytes >= WORTH_RETURNING:
            return_freed_memory()  # what packing needed
        self.wake("kv_cache")
        return checksum


def _check_dtype(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise WeightsError(
                f"{name} arrived as {tensor.dtype}, the engine holds {dtype}: export the weights in rollout.dtype"
            )


def _reload(model: Any, model_config: Any, tensors: Mapping[str, torch.Tensor], faults: list[str]) -> None:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    try:
        model.load_weights(iter(tensors.items()))
    except (KeyError, ValueError) as error:
        raise WeightsError(f"vLLM does not take the weights: {error}") from error
    finally:
        finalize_layerwise_reload(model, model_config)
    head, embedding = _tied(model)
    if head is not None and head.weight.device.type == "cpu":
        head.weight = embedding.weight  # which a reload packs anew, but not the head
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
        faults.extend(_product_faults("lm_head", head, embedding.weight))


def _tied(model: Any) -> tuple[Any, Any]:
    """The output head and the embedding where they are two modules over one matrix, else (None, None)."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    head = getattr(model, "lm_head", None)
    if not isinstance(head, ParallelLMHead) or not getattr(model.config, "tie_word_embeddings", False):
        return None, None
    for module in model.modules():
        tied = isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
        if tied and (module.num_embeddings, module.embedding_dim) == (head.num_embeddings, head.embedding_dim):
            return head, module
    return None, None


def _repack_experts(layer: Any) -> None:
    """A reload leaves experts as they arrived where the kernel, on CPU, takes packed ones."""
    kernel = getattr(layer.quant_method, "moe_kernel", None)
    if kernel is not None and layer.w13_weight.device.type == "cpu":
        kernel.fused_experts.process_weights_after_loading(layer)


@contextmanager
def _watch_packing(model: torch.nn.Module, held: HeldWeights, faults: list[str]) -> Iterator[None]:
    """While open: whenever vLLM packs a layer, note the checksums of what it packs, and faults of what comes out."""
    watched = [(name, module) for name, module in model.named_modules() if hasattr(module, "quant_method")]
    for module_name, module in watched:
        method: Any = module.quant_method
        pack = method.process_weights_after_loading

        def watch(layer: Any, module_name: str = module_name, pack: Callable[[Any], None] = pack) -> None:
            plain = dict(layer.named_parameters(recurse=False))
            pack(layer)
            _repack_experts(layer)
            for name, tensor in plain.items():
                if getattr(layer, name).numel() < tensor.numel():
                    held.note(module_name, layer, name, tensor)
            if hasattr(layer, "cpu_linear"):
                faults.extend(_product_faults(module_name, layer, plain["weight"]))

        method.process_weights_after_loading = watch
    try:
        yield
    finally:
        for _, module in watched:
            module.quant_method.__dict__.pop("process_weights_after_loading", None)


def _product_faults(name: str, layer: Any, weight: torch.Tensor) -> list[str]:
    """What is wrong where the layer does not multiply a probe as `weight` does."""
    probe = torch.linspace(-1, 1, weight.shape[1], dtype=torch.float32).sin().to(weight.dtype)[None]
    expected = torch.nn.functional.linear(probe, weight).float()
    found = layer.cpu_linear(probe, weight, None).float()
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if error <= PROBE_TOLERANCE[weight.dtype] * (scale + 1e-6):
        return []
    if not bool(weight.isfinite().all()):
        return [f"the weights of {name} arrived with values that are not finite (NaN, or infinite); {REMEDY}"]
    return [f"{name}: the packed weights differ from those that were loaded (by {error:.3g})"]
