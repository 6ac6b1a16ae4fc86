"""One comparison: the largest difference from the golden value, and the largest that is allowed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Comparison:
    """What was compared, and how far off it is at worst."""

    name: str
    largest: float
    """Largest difference; nan counts as too large."""
    tolerance: float
    """0: must be equal."""
    values: int = 1
    """How many values were compared."""

    @property
    def holds(self) -> bool:
        return self.largest <= self.tolerance

    def line(self) -> str:
        verdict = "ok" if self.holds else "TOO LARGE"
        return f"{self.name:<58} {self.values:>8}  {self.largest:>9.2e}  {self.tolerance:>9.0e}  {verdict}"


HEADER = f"{'comparison':<58} {'values':>8}  {'largest':>9}  {'allowed':>9}"


def difference(
    name: str,
    found: npt.ArrayLike | Sequence[float],
    golden: npt.ArrayLike | Sequence[float],
    tolerance: float,
    scale: npt.ArrayLike = 1.0,
) -> Comparison:
    """The largest |found - golden| / scale of two arrays of one shape; infinite where the shapes differ."""
    ours, theirs = np.asarray(found, np.float64), np.asarray(golden, np.float64)
    if ours.shape != theirs.shape:
        return Comparison(f"{name} (shapes {ours.shape} and {theirs.shape})", float("inf"), tolerance)
    distances = np.abs(ours - theirs) / np.asarray(scale, np.float64)
    return Comparison(name, float(distances.max(initial=0.0)), tolerance, ours.size)


def unequal(
    name: str, found: Sequence[Sequence[int] | np.ndarray], golden: Sequence[Sequence[int] | np.ndarray]
) -> Comparison:
    """How many token sequences differ, in content or place; none may."""
    wrong = sum(list(ours) != list(theirs) for ours, theirs in zip(found, golden, strict=False))
    return Comparison(f"{name}: sequences that differ", wrong + abs(len(found) - len(golden)), 0.0, len(golden))
