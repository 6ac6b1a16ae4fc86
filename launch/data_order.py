"""Which examples each step trains on: a pure function of the seed and the step."""

import numpy as np

from launch.config import ConfigError


class DataOrder:
    """Shuffled passes over n examples, cut into steps.

    >>> order = DataOrder(num_examples=10_000, per_step=32, seed=0)
    >>> order[7]        # int64 [32], the examples of step 7; the same after a resume
    """

    def __init__(self, num_examples: int, per_step: int, seed: int) -> None:
        if num_examples < per_step:
            raise ConfigError(
                f"train.prompts_per_step={per_step} but the training split has {num_examples} examples; lower it"
            )
        self.num_examples, self.per_step, self.seed = num_examples, per_step, seed
        self._passes: dict[int, np.ndarray] = {}
        """The orders of the passes that the last step took from: shuffling millions of examples takes a while."""

    def steps_in(self, epochs: float) -> int:
        """Steps that `epochs` passes take; a remainder of a pass shorter than a step is carried to the next pass."""
        return max(1, int(epochs * self.num_examples / self.per_step))

    def __getitem__(self, step: int) -> np.ndarray:
        first = step * self.per_step
        positions = np.arange(first, first + self.per_step)
        epochs = positions // self.num_examples
        asked = np.unique(epochs).tolist()
        self._passes = {
            epoch: self._passes[epoch] if epoch in self._passes else self._shuffled(epoch) for epoch in asked
        }
        return np.concatenate([self._passes[epoch][positions[epochs == epoch] % self.num_examples] for epoch in asked])

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_examples)
