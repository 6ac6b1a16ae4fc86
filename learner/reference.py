"""The reference model: a frozen copy of the policy that the KL term holds the policy to."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from learner.checkpoint import CheckpointError
from learner.config import LearnerConfig
from learner.lora import adapter_weights
from learner.policy import Policy

Buckets = Iterable[Sequence[tuple[str, Tensor]]]


def shares_weights(config: LearnerConfig) -> bool:
    """Whether adapters are all that a reference has of its own, beside the frozen weights of the policy.

    Not where it moves part of the way to the policy, since what lies between two policies is not of the adapters'
    rank, and not under ZeRO-3, which leaves no rank a whole weight.
    """
    moves_in_part = config.reference_sync_every > 0 and config.reference_sync_alpha < 1
    return config.lora.rank > 0 and config.zero_stage < 3 and not moves_in_part


class Reference:
    """A frozen model on every rank, in host memory between uses where `offload` asks for it.

    >>> reference = Reference(Policy(lm), partial(named_weights, engine, policy.lm), device, offload=False)
    >>> reference.follow(alpha=1.0)     # the policy when RL begins
    >>> with reference.ready() as policy: logprobs = policy(batch)
    >>> reference.follow(alpha=0.6)     # every N steps

    Of a model with adapters these alone are its own, copied and saved; its other weights are the policy's.
    """

    def __init__(self, policy: Policy, source: Callable[[], Buckets], device: torch.device, offload: bool):
        """source: the policy's present weights in buckets of (name, weight), those that are the reference's own."""
        self._weights = adapter_weights(policy.lm) or dict(policy.lm.named_parameters())
        self._policy = policy.requires_grad_(False).eval()
        self._source = source
        self._device = device
        self._offload = offload and device.type != "cpu"
        if not self._offload:
            self._policy.to(device)
        elif device.type == "cuda":  # which copies out of pinned memory faster, and without a wait
            for weight in self._weights.values():
                weight.data = weight.data.pin_memory()

    @contextmanager
    def ready(self) -> Iterator[Policy]:
        """The model on the learner's device, without gradients."""
        in_host_memory = [weight.data for weight in self._weights.values()]
        if self._offload:
            self._policy.to(self._device, non_blocking=True)
        with torch.no_grad():
            yield self._policy
        if self._offload:  # nothing has changed them: they need not be copied back
            for weight, own in zip(self._weights.values(), in_host_memory, strict=True):
                weight.data = own

    def follow(self, alpha: float) -> None:
        """reference = alpha * policy + (1 - alpha) * reference, in the weights' own precision."""
        self._blend(self._source(), alpha)

    @torch.no_grad()
    def _blend(self, buckets: Buckets, alpha: float) -> None:
        for name, weight in (entry for bucket in buckets for entry in bucket):
            own = self._weights[name]
            if alpha == 1.0:
                own.copy_(weight)
            else:
                weight = weight.to(own.device)  # by now nothing copies `own` to a GPU any more
                own.mul_(1.0 - alpha).add_(weight, alpha=alpha)

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.detach().cpu().contiguous() for name, weight in self._weights.items()}, file)

    def load(self, file: Path) -> None:
        """Raises CheckpointError for one of another kind."""
        weights = load_file(file)
        if weights.keys() != self._weights.keys():
            raise CheckpointError(
                f"{file} is a reference of another kind: with adapters, learner.reference_sync_every and "
                "reference_sync_alpha decide whether it is a whole model"
            )
        self._blend([list(weights.items())], alpha=1.0)
