"""Which rewards are added up."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RewardTerm:
    """One weighted term of the reward."""

    name: str = "rule"
    """Registered name, import path "package.module:Name" or file path "../file.py:name"."""
    weight: float = 1.0
    """Factor of the term in the sum."""
    label: str | None = None
    """Name in metrics and columns; the name behind the colon when left out."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward."""
    replicas: int = 1
    """Actors that share the tables."""
    num_cpus: float = 0.0
    """CPUs that each actor reserves."""
    num_gpus: float = 0.0
    """GPUs that each actor reserves."""
    timeout_s: float = 120.0
    """Longest wait for one table."""

    @property
    def key(self) -> str:
        """What metrics, columns and messages call the term."""
        return self.label or self.name.rpartition(":")[2]
