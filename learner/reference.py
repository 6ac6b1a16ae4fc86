"""The reference model: a frozen copy of the policy that the KL term holds the policy to."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from learner.policy import Policy


class Reference:
    """A whole frozen model on every rank, in host memory between uses where `offload` asks for it.

    >>> reference = Reference(Policy(lm), device, offload=False)
    >>> reference.copy_from(named_weights(engine, policy.lm))           # the policy when RL begins
    >>> with reference.ready() as policy: logprobs = policy(batch)
    >>> reference.blend(named_weights(engine, policy.lm), alpha=0.6)    # every N steps
    """

    def __init__(self, policy: Policy, device: torch.device, offload: bool):
        self._policy = policy.requires_grad_(False).eval()
        self._weights = dict(policy.lm.named_parameters())
        self._device = device
        self._offload = offload and device.type != "cpu"
        if not self._offload:
            self._policy.to(device)

    @contextmanager
    def ready(self) -> Iterator[Policy]:
        """The model on the learner's device, without gradients."""
        in_host_memory = [weight.data for weight in self._weights.values()]
        if self._offload:
            self._policy.to(self._device)
        with torch.no_grad():
            yield self._policy
        if self._offload:  # nothing has changed them: they need not be copied back
            for weight, own in zip(self._weights.values(), in_host_memory, strict=True):
                weight.data = own

    def copy_from(self, buckets: Iterable[Sequence[tuple[str, Tensor]]]) -> None:
        """Take the policy's weights."""
        self.blend(buckets, alpha=1.0)

    @torch.no_grad()
    def blend(self, buckets: Iterable[Sequence[tuple[str, Tensor]]], alpha: float) -> None:
        """reference = alpha * policy + (1 - alpha) * reference, in the weights' own precision."""
        for name, weight in (entry for bucket in buckets for entry in bucket):
            own = self._weights[name]
            if alpha == 1.0:
                own.copy_(weight)
            else:
                own.mul_(1.0 - alpha).add_(weight.to(own.device), alpha=alpha)

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.detach().cpu().contiguous() for name, weight in self._weights.items()}, file)

    def load(self, file: Path) -> None:
        self.copy_from([list(load_file(file).items())])
