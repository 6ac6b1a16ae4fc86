"""What every rollout engine offers."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from rollout.config import Strategy
from rollout.groups import Candidates

if TYPE_CHECKING:
    from rollout.weights import WeightBucket


class EngineDied(RuntimeError):
    """A process of an engine has ended; the engine answers no more, and a new one has to be made."""


class RolloutEngine(Protocol):
    """Generates groups with the weights of one policy version.

    >>> engine = WorkerEngine(model_path, trie, config)
    >>> groups = engine.generate(prompts, seeds, target_classes)
    >>> loaded = engine.load_weights(buckets)          # == the exporter's checksum
    """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        target_classes: Sequence[int],
        *,
        group_size: int | None = None,
        strategy: Strategy | None = None,
    ) -> list[Candidates]:
        """One group per prompt: a pure function of the weights, the prompts and the seeds.

        prompts: token ids. seeds: one per prompt, used by the sampling strategies. target_classes: one per prompt,
        used by `dynamic` only. group_size, strategy: replace the configured ones (evaluation: beam search, 50 beams).
        """
        ...

    def load_weights(self, buckets: Iterable["WeightBucket"]) -> int:
        """Load all weights, drop every cached key and value, return the checksum of what the engine then holds.

        Raises WeightsError for a tensor that is missing, unknown, or not of the engine's dtype.
        """
        ...

    def sleep(self) -> None:
        """Let go of weights and KV cache. load_weights wakes the engine; before, it must not be asked for anything."""
        ...

    def shutdown(self) -> None:
        """Free the engine's memory and processes."""
        ...
