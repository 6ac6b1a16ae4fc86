"""The reference model where it waits in host memory."""

import pytest
import torch

from learner.policy import Policy
from learner.reference import Reference
from tests.test_policy import language_model


def test_an_offloaded_reference_is_not_copied_back_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """With copies on the CPU in place of those on a GPU."""
    policy = Policy(language_model("llama"))
    reference = Reference(policy, torch.device("meta"), offload=True)
    in_host_memory = [weight.data_ptr() for weight in policy.parameters()]

    def to(_: torch.device | str) -> None:
        for weight in policy.parameters():
            weight.data = weight.data.clone()

    monkeypatch.setattr(policy, "to", to)
    with reference.ready():
        assert all(weight.data_ptr() not in in_host_memory for weight in policy.parameters())
    assert [weight.data_ptr() for weight in policy.parameters()] == in_host_memory
