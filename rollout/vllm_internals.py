"""Names of vLLM's objects that are not its public interface, and the model of a worker, driven by them.

An engine that starts checks that each name is still there, and says which one moved. What other files import from
vLLM's inner modules says so itself where it moves; docs/rollout.md lists those files.
"""

import glob
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rollout.vllm_last_layer import LastLayerHooks

ENGINE_NAMES = ("model_config", "model_executor", "engine_core")
"""Of vLLM's engine: what it computes, whether its processes live, and their end. Both engines."""
WORKER_NAMES = ("model_runner", "model_config", "vllm_config", "sleep", "wake_up")
"""Of vLLM's worker: new weights, and sleep. Both engines."""
LOADING_NAMES = ("model", "get_model", "device", "kv_caches")
"""Of the worker's model runner: new weights, and sleep. Both engines."""
RUNNER_NAMES = (
    "model",
    "device",
    "vllm_config",
    "attn_groups",
    "kv_caches",
    "kv_cache_config",
    "input_ids",
    "positions",
    "is_padding",
    "max_num_tokens",
    "model_config",
    "max_num_reqs",
    "uses_mrope",
    "cudagraph_dispatcher",
)
"""Of the worker's model runner: the search. The worker engine."""

PADDING_SLOT = -1
"""Where the key and value of a padding token go: nowhere."""

COPY_BYTES = 256 * 2**20
"""Most memory of the blocks of all layers that are on their way to their copies."""

OTHER_VLLM = "install the vLLM that pyproject.toml names"
"""What helps where both engines need a name."""


class UnsupportedModelError(RuntimeError):
    """An engine cannot drive this model or this vLLM; the message says what it met."""


def check_names(owner: Any, names: Sequence[str], remedy: str) -> None:
    """Raise UnsupportedModelError, with the remedy, for names that an object of vLLM's does not have."""
    if missing := [name for name in names if not hasattr(owner, name)]:
        raise UnsupportedModelError(
            f"vLLM's {type(owner).__name__} has no {', '.join(missing)}; this vLLM is not the one that "
            f"rollout/vllm_internals.py was written for: {remedy}"
        )


def unlink_shared_memory() -> None:
    """Remove the names of the memory by which ranks on CPUs talk, once all of them have mapped it, in a worker.

    It is then freed with the last rank, however that ends; vLLM leaves it in /dev/shm, which is small in containers.
    """
    if engine := os.environ.get("VLLM_DIST_IDENT"):
        for segment in Path("/dev/shm").glob(f"{glob.escape(engine)}-*-cpushm_*"):
            segment.unlink(missing_ok=True)  # another rank may be faster


@dataclass(frozen=True)
class TokenBatch:
    """One forward pass of N rows with T tokens in all; host arrays but for the token ids."""

    token: torch.Tensor
    """int32 [T], on the device."""
    position: np.ndarray
    """int64 [T]"""
    slot: np.ndarray
    """int64 [T]: block * block size + offset, where each token's key and value go."""
    count: np.ndarray
    """int32 [N]: tokens of each row."""
    length: np.ndarray
    """int32 [N]: tokens of each row after this pass, those in the cache included."""
    table: np.ndarray
    """int32 [N, columns]: the blocks of each row."""
    wanted: np.ndarray
    """int64 [K], ascending: the tokens whose hidden states are asked for."""


class PagedModel:
    """The model of a vLLM worker with its paged KV cache.

    >>> model = PagedModel(worker.model_runner)
    >>> hidden = model.forward(batch)                 # [K, H]
    >>> logits = model.logits(hidden)                 # [K, V]
    """

    def __init__(self, runner: Any) -> None:
        check_names(runner, RUNNER_NAMES, "use rollout.engine=requests")
        self._runner = runner
        self.device: torch.device = runner.device
        self.max_batched_tokens: int = runner.max_num_tokens
        self.max_rows: int = runner.max_num_reqs
        self.vocab_size: int = runner.model_config.get_vocab_size()
        spec = self._only_spec()
        self.num_blocks = int(runner.kv_caches[0].shape[0])
        self.block_size = spec.block_size * runner.kv_cache_config.num_blocks // self.num_blocks
        on_cpu = self.device.type == "cpu"
        self._last_layer = LastLayerHooks.of(runner.model, runner.vllm_config) if on_cpu else None

    def _only_spec(self) -> Any:
        """The KV-cache specification of the one group of full-attention layers."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        if self._runner.uses_mrope:
            raise UnsupportedModelError(
                "the model has multi-dimensional positions; the worker engine serves text models: "
                "use rollout.engine=requests"
            )
        groups = self._runner.kv_cache_config.kv_cache_groups
        kinds = [type(group.kv_cache_spec).__name__ for group in groups]
        # Not a subclass: latent attention, sinks and others ask more of a runner.
        if len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec:
            raise UnsupportedModelError(
                f"the model's KV cache has groups {kinds}; the worker engine serves one group of full attention: "
                "use rollout.engine=requests"
            )
        return groups[0].kv_cache_spec

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        """Hidden states [K, H] of the tokens that the batch wants; keys and values of all are then in the cache.

        Where the runner has captured CUDA graphs of the parts between attention layers, they are replayed: tokens and
        positions go through the runner's own buffers, padded to a captured size.
        """
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import set_forward_context

        runner, num_tokens = self._runner, len(batch.position)
        mode, descriptor = runner.cudagraph_dispatcher.dispatch(num_tokens, invalid_modes={CUDAGraphMode.FULL})
        padded = descriptor.num_tokens
        token, position = runner.input_ids.gpu[:padded], runner.positions[:padded]
        token[:num_tokens].copy_(batch.token)
        position[:num_tokens].copy_(torch.from_numpy(batch.position), non_blocking=True)
        slot = torch.full((padded,), PADDING_SLOT, dtype=torch.int64, device=self.device)
        slot[:num_tokens].copy_(torch.from_numpy(batch.slot), non_blocking=True)
        padding = runner.is_padding[:padded]  # experts leave these tokens out; a captured graph reads this very buffer
        padding[:num_tokens], padding[num_tokens:] = False, True
        metadata = self._attention_metadata(batch.count, batch, position[:num_tokens], slot)
        slots, wanted, computed = dict.fromkeys(metadata, slot), batch.wanted, padded
        limits: AbstractContextManager[None] = nullcontext()
        if self._last_layer is not None and (ends := _ends_that_suffice(batch)) is not None:
            end, wanted, computed = self._to_device(ends), np.searchsorted(ends, wanted), len(ends)
            last = self._attention_metadata(np.ones_like(batch.count), batch, position[end], slot[end])
            metadata[self._last_layer.layer_name] = last[self._last_layer.layer_name]
            limits = self._last_layer.only(end)
        with (
            limits,
            set_forward_context(
                metadata,
                runner.vllm_config,
                num_tokens=padded,
                cudagraph_runtime_mode=mode,
                batch_descriptor=descriptor,
                slot_mapping=slots,
                is_padding=padding,
            ),
        ):
            hidden = runner.model(input_ids=token, positions=position)
        if len(hidden) != computed:
            raise UnsupportedModelError(
                f"vLLM's model returned {len(hidden)} hidden states, not {computed}: use rollout.engine=requests"
            )
        hidden = hidden[:num_tokens]
        if len(wanted) < len(hidden):
            return hidden[self._to_device(wanted)]
        return hidden if mode == CUDAGraphMode.NONE else hidden.clone()  # the next replay writes over it

    def _attention_metadata(
        self, count: np.ndarray, batch: TokenBatch, position: torch.Tensor, slot: torch.Tensor
    ) -> dict[str, Any]:
        """Per layer: what the attention backend wants to know about a batch of whose rows the last tokens are queries.

        count: int32 [N], queries of each row. position, slot: [sum of count], on the device.
        """
        from vllm.v1.attention.backend import CommonAttentionMetadata

        start = torch.zeros(len(count) + 1, dtype=torch.int32)
        torch.cumsum(torch.from_numpy(count), 0, out=start[1:])
        length = torch.from_numpy(batch.length)
        common = CommonAttentionMetadata(
            query_start_loc=self._to_device(start),
            query_start_loc_cpu=start,
            seq_lens=self._to_device(length),
            num_reqs=len(count),
            num_actual_tokens=len(position),
            max_query_len=int(count.max()),
            max_seq_len=int(batch.length.max()),
            block_table_tensor=self._to_device(batch.table),
            slot_mapping=slot,
            causal=True,
            seq_lens_cpu_upper_bound=length,
            positions=position,
        )
        metadata: dict[str, Any] = {}
        for groups in self._runner.attn_groups:
            for group in groups:
                metadata.update(dict.fromkeys(group.layer_names, group.build_metadata(common)))
        return metadata

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, V] in the model's precision; with tensor parallelism, whole on every rank."""
        logits = self._runner.model.compute_logits(hidden)
        if logits is None:
            raise UnsupportedModelError(
                "vLLM gathers the logits on one rank only on this platform; set rollout.tensor_parallel=1 or "
                "use rollout.engine=requests"
            )
        return logits

    @property
    def is_first_rank(self) -> bool:
        """Whether it is the rank whose candidates are read, of those that tensor parallelism runs in lockstep."""
        from vllm.distributed import get_tensor_model_parallel_rank

        return get_tensor_model_parallel_rank() == 0

    def agree(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor on every rank, so that tensor-parallel ranks take the same decisions."""
        from vllm.distributed import get_tp_group

        return get_tp_group().broadcast(tensor.contiguous(), src=0)

    def copy_blocks(self, source: np.ndarray, destination: np.ndarray) -> None:
        """Copy whole blocks of the KV cache, in every layer; they are its first dimension. None is in both lists."""
        if not len(source):
            return
        read, written = self._to_device(source.astype(np.int64)), self._to_device(destination.astype(np.int64))
        caches = list({cache.data_ptr(): cache for cache in self._runner.kv_caches}.values())  # layers may share one
        if self.device.type != "cpu" and (layers := stacked(caches)) is not None:  # on a GPU, launches are what costs
            at_once = max(1, COPY_BYTES // (layers[:, 0].numel() * layers.element_size()))
            for some, to in zip(read.split(at_once), written.split(at_once), strict=True):
                layers.index_copy_(1, to, layers.index_select(1, some))
            return
        neighbours = self.device.type == "cpu" and bool((np.diff(destination) == 1).all())
        for cache in caches:
            if neighbours:  # torch scatters with one thread, and selects only into what it takes for other memory
                to = cache[int(destination[0]) : int(destination[-1]) + 1]
                torch.index_select(torch.from_dlpack(cache), 0, read, out=to)
            else:
                cache.index_copy_(0, written, cache.index_select(0, read))

    def _to_device(self, array: np.ndarray | torch.Tensor) -> torch.Tensor:
        tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
        return tensor.to(self.device, non_blocking=True)


def stacked(caches: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """[L, ...], a view over L caches [...] that lie in one memory at equal distances, in their order there; else None.

    vLLM puts those of layers that are alike into one allocation, layer behind layer or block behind block.
    """
    first, *others = sorted(caches, key=lambda cache: cache.storage_offset())
    offsets = [int(cache.storage_offset()) for cache in (first, *others)]
    distances = set(np.diff(offsets).tolist())
    alike = all(
        cache.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and (cache.dtype, cache.shape, cache.stride()) == (first.dtype, first.shape, first.stride())
        for cache in others
    )
    if not alike or len(distances) > 1:
        return None
    return first.as_strided((len(caches), *first.shape), (*(distances or {0}), *first.stride()))


def _ends_that_suffice(batch: TokenBatch) -> np.ndarray | None:
    """int64 [N]: the last token of every row, if there are others and none of those is wanted."""
    if len(batch.count) == len(batch.position) or len(batch.wanted) > len(batch.count):
        return None
    ends = np.cumsum(batch.count, dtype=np.int64) - 1
    return ends if np.isin(batch.wanted, ends).all() else None
