"""Weights in the object store, which every worker loads by itself."""

from dataclasses import dataclass

import ray
from ray.actor import ActorHandle


@dataclass(frozen=True)
class PublishedWeights:
    """The latest exported weights. The driver keeps it, so that a restarted worker can be given them again."""

    version: int
    bucket_refs: list[ray.ObjectRef]
    checksum: int

    def load(self, worker: ActorHandle) -> ray.ObjectRef:
        """Start loading them on one worker."""
        return worker.load_weights.remote(self.version, self.bucket_refs, self.checksum)
