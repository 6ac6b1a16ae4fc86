"""One data-parallel learner rank as a Ray actor: the Learner with a place, a name in its errors, and a lockstep."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import psutil
import pyarrow as pa
import ray

from learner.config import LearnerConfig
from rollout.config import LogprobSpace
from rollout.host_memory import host_environment
from rollout.imports import collector_at_rest

if TYPE_CHECKING:
    from rollout.weights import WeightBucket

P = ParamSpec("P")
R = TypeVar("R")

PEER_LOST = "another rank is gone or late"
"""Marks the error of a rank that failed only because another did."""


class LearnerError(RuntimeError):
    """A rank failed; the message names the rank and what it was doing."""


def _named(method: Callable[P, R]) -> Callable[P, R]:
    """Errors of a call say which rank it was on."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            raise _error(args[0], method.__name__, error) from error

    return call


def _named_stream(method: Callable[P, Iterator[R]]) -> Callable[P, Iterator[R]]:
    """The same for a call that yields."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        try:
            yield from method(*args, **kwargs)
        except Exception as error:
            raise _error(args[0], method.__name__, error) from error

    return call


COMPILED_PRODUCTS = 192
"""Of the shapes of a step's micro-batches: a small model's would otherwise be compiled anew in every step, which takes
a twentieth of it."""


def rank_environment(on_gpu: bool) -> dict[str, str]:
    """What a rank's process must start with.

    Ranks, rollout workers and rewards share cores, so waiting threads must soon sleep, but not at once: waking them
    for each of a small model's many short loops would cost a third of its step.
    """
    spinning = {"GOMP_SPINCOUNT": "10000"}
    if not on_gpu:
        return spinning | host_environment(COMPILED_PRODUCTS)
    growing = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # no two steps have the same shapes
    return spinning | {name: value for name, value in growing.items() if name not in os.environ}


@ray.remote
class LearnerRank:
    """The policy, its optimizer and its reference on one device, in lockstep with the other ranks.

    >>> actor = LearnerRank.options(runtime_env={"env_vars": rank_environment(on_gpu)}, ...)
    >>> ranks = [actor.remote(rank, world_size, model_path, ...) for rank in range(world_size)]
    >>> addresses = ray.get([rank.address.remote() for rank in ranks])
    >>> ray.get([rank.join.remote(*addresses[0], ranks_here) for rank in ranks])
    >>> streams = [rank.sft.options(num_returns="streaming").remote(folder) for rank in ranks]
    >>> metrics, *_ = ray.get([rank.step.remote(*table_refs) for rank in ranks])
    >>> streams = [rank.export_weights.options(num_returns="streaming").remote() for rank in ranks]
    >>> ray.get([rank.save_checkpoint.remote(path, state, keep) for rank in ranks])

    Every call but `address` must be made on all ranks, and every stream read to its end: ranks wait for each other at
    most config.timeout_s. When one dies the others fail within a second; then kill all and start from a checkpoint.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        model_path: str,
        catalog_path: str,
        config: LearnerConfig,
        logprob_space: LogprobSpace = "vocabulary",
        total_steps: int = 1,
        staleness: int = 0,
        seed: int = 0,
    ):
        """See Learner."""
        self._rank, self._world_size = rank, world_size
        self._model_path, self._catalog_path, self._config = model_path, catalog_path, config
        self._logprob_space, self._total_steps = logprob_space, total_steps
        self._staleness, self._seed = staleness, seed

    def address(self) -> tuple[str, int]:
        """This rank's host, and the port of a store that it opens there; the ranks meet at rank 0's.

        It stays open, so that nobody else takes the port before `join`, which finds it since it takes many tenants.
        """
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        return host, self._store.port

    @_named
    def join(self, master_host: str, master_port: int, ranks_here: int) -> None:
        """Meet the other ranks, load the model, set up ZeRO. Returns when all ranks stand.

        master_host, master_port: rank 0's address. ranks_here: ranks on this node, which share its cores.
        """
        with collector_at_rest():
            import torch
            from transformers.utils.logging import disable_progress_bar

            from catalog.catalog import Catalog
            from learner.engine import join_process_group
            from learner.learner import Learner

        disable_progress_bar()
        torch.set_num_threads(self._config.threads or max(1, len(os.sched_getaffinity(0)) // ranks_here))
        os.environ["GLOO_SOCKET_IFNAME"] = _interface(ray.util.get_node_ip_address())
        device = join_process_group(self._rank, self._world_size, master_host, master_port, self._config.timeout_s)
        self._learner = Learner(
            self._model_path,
            Catalog.load(self._catalog_path),
            self._config,
            self._logprob_space,
            self._total_steps,
            self._staleness,
            device,
            self._seed,
        )
        self._learner.return_freed_memory()

    @_named_stream
    def sft(self, folder: str) -> Iterator[dict[str, float]]:
        """SFT; yields reports, the last of an epoch with `valid_loss` and `stop`. folder: see Learner.sft."""
        yield from self._learner.sft(Path(folder))

    @_named
    def step(self, *tables: pa.Table) -> dict[str, float]:
        """One RL step on the groups of all tables (every rank gets all of them); metrics are equal on all ranks."""
        return self._learner.step(tables)

    @_named
    def check_rollouts(self, *tables: pa.Table) -> None:
        """Fail unless these scored groups come from the present weights; every rank gets all of them."""
        self._learner.check_rollouts(tables)

    @_named_stream
    def export_weights(self) -> Iterator["WeightBucket"]:
        """All weights in buckets from rank 0; the other ranks yield nothing."""
        if self._config.sleep:  # workers wake next
            self._learner.return_freed_memory()
        yield from self._learner.export_weights()

    @_named
    def weights_checksum(self) -> int:
        """rollout.weights.checksum of what export_weights sends."""
        return self._learner.weights_checksum()

    @_named
    def save_checkpoint(self, path: str, state: dict[str, Any], keep: int | None = None) -> None:
        """See Learner.save_checkpoint."""
        self._learner.save_checkpoint(Path(path), state, keep)

    @_named
    def load_checkpoint(self, path: str) -> dict[str, Any]:
        """See Learner.load_checkpoint; returns the state that the driver had saved."""
        return self._learner.load_checkpoint(Path(path))

    @_named
    def save_huggingface(self, path: str) -> None:
        """Write a Hugging Face directory of the policy."""
        self._learner.save_huggingface(Path(path))


def _error(rank: Any, doing: str, error: Exception) -> LearnerError:
    """The error of a call, marked where it is the fault of another rank."""
    from learner.lost_peer import lost_a_peer

    text = f"{type(error).__name__}: {error}".strip()
    message = f"learner rank {rank._rank} of {rank._world_size} failed in {doing}: {text}"
    if lost_a_peer(error):
        message += f"\n{PEER_LOST}; its own error says why. Restart all ranks from a checkpoint"
    return LearnerError(message)


def _interface(address: str) -> str:
    """Name of the network interface that has `address`."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    raise LearnerError(f"no network interface of this host has its Ray address {address}")
