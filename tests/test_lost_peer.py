"""Which errors of a rank are the fault of another: real ones of Gloo and of the store, and those that read alike."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from learner.checkpoint import CheckpointError
from learner.lost_peer import Rank0Failed, lost_a_peer
from learner.mismatch import MismatchError
from learner.objectives import ObjectiveError
from learner.rank import PEER_LOST, _error

SHORT = timedelta(seconds=0.5)
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] "


def two_of_gloo() -> list[distributed.ProcessGroup]:
    """Both ranks of a process group, in this process."""
    store = distributed.HashStore()

    def join(rank: int) -> distributed.ProcessGroup:
        return distributed.ProcessGroupGloo(store, rank, 2, SHORT)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(join, range(2)))


def wait_for_a_late_rank() -> None:
    one, _other = two_of_gloo()
    one.allreduce([torch.ones(3)]).wait()


def wait_for_a_rank_that_is_gone() -> None:
    ranks = two_of_gloo()
    ranks.pop()
    ranks[0].allreduce([torch.ones(3)]).wait()


def meet_at_nobodys_store() -> None:
    distributed.TCPStore("127.0.0.1", 1, is_master=False, timeout=SHORT)


def wait_in_the_store_for_a_late_rank() -> None:
    distributed.HashStore().wait(["its address"], SHORT)


def meet_alone() -> None:
    distributed.TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=timedelta(seconds=1))


@pytest.mark.parametrize(
    "wait",
    [
        wait_for_a_late_rank,
        wait_for_a_rank_that_is_gone,
        meet_at_nobodys_store,
        wait_in_the_store_for_a_late_rank,
        meet_alone,
    ],
)
def test_waiting_for_another_rank_in_vain_is_its_fault(wait: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError) as caught:
        wait()
    assert lost_a_peer(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        Rank0Failed("its own error says why"),
        RuntimeError(f"{GLOO}Connection closed by peer [127.0.0.1]:32954"),
        RuntimeError(f"{GLOO}Application timeout caused pair closure"),
        distributed.DistBackendError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"),
        distributed.DistBackendError("NCCL communicator was aborted on rank 0."),
    ],
)
def test_a_lost_peer_is_marked_for_the_driver(error: Exception) -> None:
    assert PEER_LOST in str(_error(SimpleNamespace(_rank=0, _world_size=2), "step", error))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a template says 'Timed out'"),
        BrokenPipeError("Broken pipe"),
        ConnectionResetError("Connection reset by peer"),
        TimeoutError("Timed out"),
        ObjectiveError("the objective raised: Connection closed"),
        CheckpointError("checkpoint 'Timed out/step-2': damaged"),
        MismatchError("Timed out"),
        RuntimeError("DataLoader: Timed out"),
        RuntimeError(f"{GLOO}op.preamble.length <= op.nbytes. 2000 vs 1000"),
        distributed.DistBackendError("NCCL error: ncclInvalidUsage: This usually reflects invalid usage of NCCL"),
    ],
)
def test_what_a_rank_does_wrong_itself_is_its_own_fault(error: Exception) -> None:
    assert not lost_a_peer(error)
    assert PEER_LOST not in str(_error(SimpleNamespace(_rank=0, _world_size=2), "step", error))
