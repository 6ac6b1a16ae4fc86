"""On a GPU, the learner waits for the device once in an optimizer step, not in every micro-batch."""

from dataclasses import replace
from typing import Any

import learner_gang
import numpy as np
import torch
from pretended_gpu import CUDA, pretended_gpu

from learner.config import LearnerConfig, SftConfig
from learner.experience import Experience
from learner.packing import PackedBatch, pack_groups
from learner.sft import SupervisedFineTuning
from learner.update import PolicyUpdate

learner_data = learner_gang.learner_data
CONFIG = LearnerConfig(micro_batch_tokens=300, sft=SftConfig(batch_size=32, valid_examples=20), inclusion_weights=True)


class Half:
    """In place of policy and engine: every title token has log-probability -0.5."""

    packing, world_size, rank = "tree", 1, 0

    def __init__(self, device: torch.device) -> None:
        self.device, self.micro_batches = device, 0

    def pack(self, prompts: Any, candidates: Any) -> PackedBatch:
        return pack_groups(prompts, candidates).to(self.device)

    def __call__(self, packed: PackedBatch) -> torch.Tensor:
        self.micro_batches += 1
        return torch.where(packed.mask, -0.5, 0.0)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        pass

    step = train = eval = lambda self, *_: None

    def total(self, values: list[float]) -> list[float]:
        return values


def fine_tuning(data: learner_gang.Data, device: torch.device) -> tuple[Any, Half]:
    stand_in: Any = Half(device)
    return SupervisedFineTuning(stand_in, stand_in, data.catalog, CONFIG), stand_in


def test_sft_reads_its_loss_once(learner_data: learner_gang.Data) -> None:
    batch = np.arange(32)
    on_cpu, _ = fine_tuning(learner_data, torch.device("cpu"))
    expected = on_cpu._update(batch, 0), on_cpu.valid_loss()
    assert expected[0][0] == 0.5 * expected[0][1]
    assert expected[1] == 0.5
    with pretended_gpu() as gpu:
        on_gpu, stand_in = fine_tuning(learner_data, CUDA)
        assert (on_gpu._update(batch, 0), on_gpu.valid_loss()) == expected
        assert stand_in.micro_batches > 4
        assert gpu.waits == ["__float__", "__float__"]


def test_micro_batches_are_sent_without_a_wait(learner_data: learner_gang.Data) -> None:
    experience = Experience.from_tables(learner_data.tables(0))
    weights = [np.full(len(rewards), 2.0, np.float32) for rewards in experience.rewards]
    experience = replace(experience, inclusion_weights=weights)
    with pretended_gpu() as gpu:
        stand_in: Any = Half(CUDA)
        update = PolicyUpdate(stand_in, stand_in, None, CONFIG, total_steps=1, staleness=0)
        micro = update._micro_batch(experience, experience.rewards, [0, 1], counts=True)
        assert micro.advantages.is_cuda
        assert micro.logp_rollout.is_cuda
        assert isinstance(micro.candidate_weights, torch.Tensor)
        assert micro.candidate_weights.is_cuda
        assert not gpu.waits
