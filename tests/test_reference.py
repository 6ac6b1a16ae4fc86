"""The reference model: where it waits in host memory, and what it shares with the policy."""

from pathlib import Path

import pytest
import torch
from torch import nn

from learner.checkpoint import CheckpointError
from learner.config import LearnerConfig, LoraConfig
from learner.lora import adapter_weights, add_adapters, merged_parameters, with_own_adapters
from learner.policy import Policy
from learner.reference import Reference, shares_weights
from tests.test_policy import groups, language_model


def test_an_offloaded_reference_is_not_copied_back_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """With copies on the CPU in place of those on a GPU."""
    policy = Policy(language_model("llama"))
    reference = Reference(policy, list, torch.device("meta"), offload=True)
    in_host_memory = [weight.data_ptr() for weight in policy.parameters()]

    def to(_: torch.device | str, non_blocking: bool) -> None:
        for weight in policy.parameters():
            weight.data = weight.data.clone()

    monkeypatch.setattr(policy, "to", to)
    with reference.ready():
        assert all(weight.data_ptr() not in in_host_memory for weight in policy.parameters())
    assert [weight.data_ptr() for weight in policy.parameters()] == in_host_memory


def test_an_offloaded_reference_is_sent_from_pinned_memory_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(language_model("llama"))
    before = {name: weight.detach().clone() for name, weight in policy.lm.named_parameters()}
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    sent: list[bool] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(policy, "to", lambda device, non_blocking: sent.append(non_blocking))
    with Reference(policy, list, torch.device("cuda"), offload=True).ready():
        assert sent == [True]
        places = {tensor.data_ptr() for tensor in pinned}
        assert {weight.data_ptr() for weight in policy.lm.parameters()} == places
    for name, weight in policy.lm.named_parameters():
        assert torch.equal(weight, before[name])


def randomize(weights: dict[str, nn.Parameter]) -> None:
    for weight in weights.values():
        nn.init.normal_(weight, std=0.1)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied-sliding", "gemma2-sliding-softcap"])
def test_a_reference_with_adapters_is_a_second_model_with_the_merged_weights(name: str) -> None:
    policy, second = Policy(language_model(name).train()), Policy(language_model(name))
    add_adapters(policy.lm, LoraConfig(rank=4, dropout=0.5))
    trained = adapter_weights(policy.lm)
    frozen = Policy(with_own_adapters(policy.lm))
    reference = Reference(frozen, lambda: [list(trained.items())], torch.device("cpu"), offload=False)

    randomize(trained)
    reference.follow(alpha=1.0)
    with torch.no_grad():
        for of_model, weight, adapted in merged_parameters(policy.lm):
            second.lm.get_parameter(of_model).copy_(adapted.merged(weight) if adapted else weight)
    randomize(trained)  # the policy goes on

    batch = policy.pack(*groups())
    with reference.ready() as model:
        found = model(batch)
    torch.testing.assert_close(found, second(batch), atol=2e-5, rtol=0)
    assert (found - policy.eval()(batch)).abs().max() > 0.1
    others = {weight.data_ptr() for name, weight in policy.lm.named_parameters() if name not in trained}
    assert {weight.data_ptr() for weight in frozen.parameters()} >= others
    assert all(weight.requires_grad for weight in trained.values())


def test_a_reference_of_another_kind_is_refused(tmp_path: Path) -> None:
    policy = Policy(language_model("llama"))
    Reference(policy, list, torch.device("cpu"), offload=False).save(tmp_path / "whole.safetensors")
    add_adapters(policy.lm, LoraConfig(rank=4))
    reference = Reference(Policy(with_own_adapters(policy.lm)), list, torch.device("cpu"), offload=False)
    with pytest.raises(CheckpointError, match=r"whole\.safetensors is a reference of another kind"):
        reference.load(tmp_path / "whole.safetensors")


def test_a_reference_that_moves_in_part_or_under_zero_3_is_a_second_model() -> None:
    adapters = LoraConfig(rank=2)
    assert shares_weights(LearnerConfig(lora=adapters, reference_sync_every=0, zero_stage=2))
    assert shares_weights(LearnerConfig(lora=adapters, reference_sync_alpha=1.0))
    assert not shares_weights(LearnerConfig(lora=adapters, reference_sync_alpha=0.6))
    assert not shares_weights(LearnerConfig(lora=adapters, reference_sync_every=0, zero_stage=3))
    assert not shares_weights(LearnerConfig(reference_sync_every=0))
