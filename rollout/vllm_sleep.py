"""What a vLLM worker lets go of while the learner works: its weights and its KV cache."""

from collections.abc import Iterator
from typing import Any

import torch

from rollout.host_memory import WORTH_RETURNING, discard_contents, return_freed_memory


class SleepWorker:
    """Methods that vLLM adds to its worker class. On a GPU they are vLLM's sleep mode (`enable_sleep_mode`)."""

    model_runner: Any
    weight_bytes = 0
    """Of the weights that were loaded last."""
    asleep: frozenset[str] = frozenset()
    """What vLLM's sleep mode has taken away."""
    _constants: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    """Tensors of the sleeping model that no load brings back, and what they held."""

    def fall_asleep(self) -> None:
        """Let go of weights and KV cache until new weights are loaded; nothing can be generated meanwhile.

        On a CPU, a model so small that touching its memory anew would cost more than it frees keeps it.
        """
        runner = self.model_runner
        if self.asleep:
            return
        if runner.device.type != "cpu":
            self._constants = tuple((tensor, tensor.to("cpu", copy=True)) for tensor in _constants(runner.get_model()))
            self.sleep(level=2)  # type: ignore[attr-defined]
            self.asleep = frozenset({"weights", "kv_cache"})
        elif self.weight_bytes >= WORTH_RETURNING:
            for module in runner.model.modules():
                vars(module).pop("cpu_linear", None)  # holds the packed matrix
            for tensor in (*runner.model.parameters(), *runner.kv_caches):
                discard_contents(tensor)
            return_freed_memory()

    def wake(self, what: str) -> None:
        """Give a sleeping worker the memory for its "weights" or its "kv_cache" again; what they held is lost."""
        if what in self.asleep:
            self.wake_up(tags=[what])  # type: ignore[attr-defined]
            self.asleep -= {what}
            if what == "weights":
                self._restore_constants()

    @torch.inference_mode()
    def _restore_constants(self) -> None:
        for tensor, value in self._constants:
            tensor.copy_(value)
        self._constants = ()


def _constants(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What layers and their attention keep as neither parameters nor buffers, such as ALiBi's slopes.

    It lies beside the weights, and vLLM saves nothing but buffers.
    """
    for module in model.modules():
        for holder in (module, getattr(module, "impl", None)):
            for name, value in getattr(holder, "__dict__", {}).items():
                if isinstance(value, torch.Tensor) and name != "kv_cache":
                    yield value
