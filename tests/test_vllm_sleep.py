"""What a worker on a GPU keeps while vLLM's sleep mode has its memory."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from rollout.vllm_sleep import SleepWorker


class Worker(SleepWorker):
    """vLLM's worker on a GPU, as far as it sleeps: what lies in the memory of the weights is lost, buffers are not."""

    def __init__(self, model: nn.Module, lost: list[torch.Tensor]) -> None:
        on_gpu = SimpleNamespace(type="cuda")
        self.model_runner = SimpleNamespace(device=on_gpu, get_model=lambda: model)
        self.lost, self.calls = lost, []

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))
        for tensor in self.lost:
            tensor.zero_()

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake_up", tags))


def test_what_no_load_brings_back_survives_sleep() -> None:
    """ALiBi's slopes belong to the attention of a layer: no parameter, no buffer."""
    model: Any = nn.Sequential(nn.Linear(2, 2))
    model[0].impl = SimpleNamespace(alibi_slopes=torch.tensor([0.5, 0.25]), scale=1.0)
    model[0].kv_cache = torch.ones(4)
    worker = Worker(model, [model[0].impl.alibi_slopes, model[0].kv_cache])
    worker.fall_asleep()
    worker.fall_asleep()
    assert model[0].impl.alibi_slopes.tolist() == [0.0, 0.0]
    worker.wake("weights")
    worker.wake("kv_cache")
    assert model[0].impl.alibi_slopes.tolist() == [0.5, 0.25]
    assert model[0].kv_cache.tolist() == [0.0] * 4  # a cache without its keys is empty
    assert worker.calls == [("sleep", 2), ("wake_up", ["weights"]), ("wake_up", ["kv_cache"])]
    assert not worker.asleep
