"""Logits that are no numbers."""

import numpy as np
import torch

from rollout.vllm_arguments import EngineError

REMEDY = (
    "start another run (NAME=) with a lower learner.optimizer.learning_rate (of SFT, "
    "learner.sft.optimizer.learning_rate), or with rollout.dtype and learner.dtype float32 if they are bfloat16, from "
    "an earlier checkpoint if there is one (MODEL=runs/.../step-N, learner.sft.epochs=0)"
)
"""What helps where weights have diverged or overflowed."""


class LogitsError(EngineError):
    """The model's logits give no probabilities to choose by."""

    def __str__(self) -> str:
        return (
            "the model's logits are not finite (NaN, or infinite), or leave no token that the trie allows: its "
            f"weights have diverged or overflowed; {REMEDY}"
        )


def check_finite(values: np.ndarray) -> None:
    """Raises LogitsError where NaN is among the values. -inf is fine: of a token that cannot come."""
    if np.isnan(values.max()):
        raise LogitsError


class FiniteCheck:
    """The same on a device that nobody waits for: remembers whether a search was given NaN, and says so at the end.

    >>> finite = FiniteCheck(device)
    >>> finite.note(children.logprob)           # in every step, without waiting for the device
    >>> finite.check()                          # at the end
    """

    def __init__(self, device: torch.device) -> None:
        self._largest = torch.full((), float("-inf"), device=device)

    def note(self, values: torch.Tensor) -> None:
        """values: of any shape, not empty."""
        self._largest = torch.maximum(self._largest, values.amax())  # both keep NaN

    def check(self) -> None:
        """Raises LogitsError where NaN was among the values."""
        if bool(self._largest.isnan()):
            raise LogitsError
