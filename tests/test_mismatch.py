"""Train/inference mismatch metrics."""

import math

import pytest
import torch

from rollout.mismatch import mismatch_metrics


def test_equal_log_probabilities_have_no_mismatch() -> None:
    logprobs = torch.randn(100)
    assert set(mismatch_metrics(logprobs, logprobs).values()) == {0.0}


def test_the_estimate_has_the_expectation_of_the_kl() -> None:
    """Over all tokens in proportion to the rollout policy, k3 averages to the exact KL."""
    rollout = torch.tensor([0.5, 0.25, 0.125, 0.125])
    learner = torch.tensor([0.4, 0.3, 0.2, 0.1])
    drawn = torch.repeat_interleave(torch.arange(4), torch.tensor([4, 2, 1, 1]))
    found = mismatch_metrics(rollout.log()[drawn], learner.log()[drawn])
    assert found["mismatch/kl"] == pytest.approx(float((rollout * (rollout / learner).log()).sum()), rel=1e-6)
    assert found["mismatch/max"] == pytest.approx(math.log(1.6), rel=1e-6)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        mismatch_metrics(torch.zeros(3), torch.zeros(4))
