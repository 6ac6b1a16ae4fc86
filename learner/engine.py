"""The one place that imports DeepSpeed: a module whose optimizer state, gradients or weights are spread by ZeRO."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from learner.config import LearnerConfig, OptimizerConfig
from learner.lost_peer import Rank0Failed
from learner.master_weights import step_master_weights
from learner.zero_config import adamw_arguments, clips_itself, zero_config
from rollout.imports import collector_at_rest

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def quiet_deepspeed() -> Any:
    """Import DeepSpeed without its banner, its compiled CPU all-reduce (80 s to build) and its progress lines."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with warnings.catch_warnings(), collector_at_rest():
        warnings.simplefilter("ignore")
        import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # DeepSpeed calls renamed functions
    return deepspeed


def join_process_group(
    rank: int, world_size: int, master_host: str, master_port: int, timeout_s: float
) -> torch.device:
    """Enter the learner's process group (nccl on GPUs, gloo elsewhere); returns this rank's device.

    Each process sees only its own device, so that is number 0. Blocks until all `world_size` ranks have called it, at
    most `timeout_s`, which is also the longest that a rank waits for the others later.
    """
    os.environ.update(
        MASTER_ADDR=master_host,
        MASTER_PORT=str(master_port),
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(world_size),
    )
    deepspeed = quiet_deepspeed()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_s)
    )
    return torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")


class ZeroEngine:
    """One optimizer step from any number of micro-batches, the same under every ZeRO stage.

    >>> engine = ZeroEngine(module, config, config.optimizer)
    >>> for micro in range(n):                    # n must be equal on all ranks
    ...     loss = objective(engine(batches[micro]))
    ...     engine.backward(loss, last=micro == n - 1)
    >>> grad_norm = engine.step(learning_rate)

    Gradients are averaged over ranks and summed over micro-batches. With bfloat16 weights the optimizer works on
    float32 copies and gradients are summed in float32 under every stage.
    """

    def __init__(self, module: nn.Module, config: LearnerConfig, optimizer: OptimizerConfig):
        deepspeed = quiet_deepspeed()
        self.stage = config.zero_stage
        self._deepspeed = deepspeed
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._adamw = torch.optim.AdamW(parameters, **adamw_arguments(optimizer), fused=True)
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=self._adamw, config=zero_config(config, optimizer)
            )
        self.signature = {
            "ranks": self.world_size,
            "zero_stage": config.zero_stage,
            "dtype": config.dtype,
            "lora_rank": config.lora.rank,
        }
        """What decides who can read the files that `save` writes."""
        self._sums_in_float32: list[nn.Parameter] = []
        self._begun = False
        self._clips_itself = clips_itself(config)
        self._clipping = optimizer.gradient_clipping
        if self.stage == 0:
            # One rank has nothing to average; DeepSpeed would still copy every gradient into a flat buffer and back.
            self._engine.enable_backward_allreduce = self._engine.world_size > 1
            if config.dtype == "bfloat16":
                self._sums_in_float32 = parameters
                self._engine.optimizer.step = partial(step_master_weights, self._engine.optimizer)
        self.restart_optimizer(optimizer)  # some stages have counted a step of zeros by now

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def rank(self) -> int:
        return self._engine.global_rank

    @property
    def world_size(self) -> int:
        return self._engine.world_size

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a scalar loss; `last` marks the step's final micro-batch, which averages over ranks."""
        if not self._begun:
            alone = last and self.world_size == 1  # nothing is added: float32 would only be more to hold
            for parameter in self._sums_in_float32:
                parameter.grad_dtype = parameter.dtype if alone else torch.float32
        self._begun = not last
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip, update the weights, drop the gradients; returns the global gradient norm before clipping.

        Raises FloatingPointError where a gradient is not finite; go on from a checkpoint then.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._clip() if self._clips_itself else None
        self._engine.step()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        if not norm < float("inf"):
            raise FloatingPointError(
                f"the gradient norm is {norm}: lower learner.optimizer.learning_rate, or look for extreme rewards in "
                "the step's rollouts, or at what an objective of your own computes of them"
            )
        return norm

    def _clip(self) -> float:
        """The global gradient norm; scales the gradients down to the clipping bound, drops them if not finite."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            self._engine.zero_grad()
        elif self._clipping > 0:
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), self._clipping, norm)
        return float(norm)

    def restart_optimizer(self, optimizer: OptimizerConfig) -> None:
        """Forget the moments and take other hyperparameters, as a new AdamW over the present weights would."""
        for group in self._engine.optimizer.param_groups:
            group.update(adamw_arguments(optimizer))
        for state in self._adamw.state.values():
            for value in state.values():
                value.zero_()
        self._clipping = optimizer.gradient_clipping
        if hasattr(self._engine.optimizer, "clip_grad"):
            self._engine.optimizer.clip_grad = optimizer.gradient_clipping

    @contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Whole weights of `parameters` inside the context, on every rank; all ranks must enter."""
        context: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(
            list(parameters), modifier_rank=None, enabled=self.stage == 3
        )
        with context:
            yield

    def full_bytes(self, parameter: nn.Parameter) -> int:
        """Size of the whole parameter, which ZeRO-3 may have left empty on this rank."""
        return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()

    def total(self, values: Iterable[float]) -> list[float]:
        """Sum over ranks of each value."""
        summed = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(summed)
        return summed.tolist()

    def of_all_ranks(self, value: T) -> list[T]:
        """The value of each rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def on_rank_0(self, action: Callable[[], None]) -> None:
        """Have rank 0 do something that the others wait for, and fail on all ranks where it raises."""
        failure: Exception | None = None
        if self.rank == 0:
            try:
                action()
            except Exception as error:
                failure = error
        if failure is not None:
            self.total([1.0])
            raise failure
        if self.total([0.0]) != [0.0]:
            raise Rank0Failed("its own error says why")

    def of_rank_0(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on all ranks; fails on all ranks where it raises."""
        made: list[Any] = [None]

        def keep() -> None:
            made[0] = make()

        self.on_rank_0(keep)
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(made, src=0)
        return made[0]

    def save(self, path: Path) -> None:
        """Write weights and optimizer state, each rank its own part; all ranks must call."""
        self._engine.save_checkpoint(str(path.parent), tag=path.name, save_latest=False)

    def load(self, path: Path) -> None:
        """Read what `save` wrote under the same stage and number of ranks; all ranks must call."""
        self._load(path, universal=False)

    def load_universal(self, path: Path) -> None:
        """Read a universal checkpoint (see `to_universal`), written by any number of ranks."""
        self._load(path, universal=True)

    def _load(self, path: Path, universal: bool) -> None:
        self._engine._config.load_universal_checkpoint = universal
        loaded, _ = self._engine.load_checkpoint(str(path.parent), tag=path.name)
        self._engine._config.load_universal_checkpoint = False
        if loaded is None:
            raise FileNotFoundError(f"{path}: DeepSpeed found no checkpoint here")

    def destroy(self) -> None:
        self._engine.destroy()


def to_universal(path: Path, out: Path) -> None:
    """Rewrite a ZeRO 1 to 3 checkpoint of any number of ranks as one that any number of ranks can load."""
    from argparse import Namespace

    from deepspeed.checkpoint.ds_to_universal import main

    main(
        Namespace(
            input_folder=str(path),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
