"""What a vLLM worker lets go of while the learner works: its weights and its KV cache."""

from typing import Any

from rollout.host_memory import WORTH_RETURNING, discard_contents, return_freed_memory


class SleepWorker:
    """Methods that vLLM adds to its worker class. On a GPU they are vLLM's sleep mode (`enable_sleep_mode`)."""

    model_runner: Any
    weight_bytes = 0
    """Of the weights that were loaded last."""
    asleep: frozenset[str] = frozenset()
    """What vLLM's sleep mode has taken away."""

    def fall_asleep(self) -> None:
        """Let go of weights and KV cache until new weights are loaded; nothing can be generated meanwhile.

        On a CPU, a model so small that touching its memory anew would cost more than it frees keeps it.
        """
        runner = self.model_runner
        if self.asleep:
            return
        if runner.device.type != "cpu":
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
