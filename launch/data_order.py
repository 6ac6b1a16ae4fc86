"""Which examples each step trains on: a pure function of the seed and the step."""

import numpy as np

from launch.config import ConfigError


class DataOrder:
    """Shuffled passes over n examples, cut into steps.

    >>> order = DataOrder(num_examples=10_000, per_step=32, seed=0)
    >>> order[7]        # int64 [32], the examples of step 7; the same after a resume
    >>> order.passes(7) # int64 [32], which pass each is of: a step may hold an example twice, of two passes
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
        positions, epochs = self._positions(step), self.passes(step)
        asked = np.unique(epochs).tolist()
        self._passes = {
            epoch: self._passes[epoch] if epoch in self._passes else self._shuffled(epoch) for epoch in asked
        }
        return np.concatenate([self._passes[epoch][positions[epochs == epoch] % self.num_examples] for epoch in asked])

    def passes(self, step: int) -> np.ndarray:
        """int64 [per_step]: the pass, from 0 on, that each example of a step is of."""
        return self._positions(step) // self.num_examples

    def _positions(self, step: int) -> np.ndarray:
        return np.arange(step * self.per_step, (step + 1) * self.per_step)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_examples)
