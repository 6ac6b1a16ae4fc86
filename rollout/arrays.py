"""Arrays that are shared, not copied."""

import warnings

import numpy as np
import torch


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over the memory of `array`, which may be a read-only map: nothing may be written to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)
