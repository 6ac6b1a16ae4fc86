"""The metrics of a run in Weights & Biases; see README.md."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import wandb

PHASES = ("sft", "train", "valid", "test")


class WandbTracker:
    """One run there for one run here: continued with RESUME=1, it goes on there, too."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        kept = run / "wandb.id"
        if not kept.is_file():
            kept.write_text(uuid4().hex)
        self._run = wandb.init(
            project="rere", name=config["name"], id=kept.read_text(), resume="allow", dir=run, config=config
        )
        for phase in PHASES:
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")

    def log(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Each phase has steps of its own."""
        self._run.log({f"{phase}/{name}": value for name, value in {"step": step, **metrics}.items()})

    def close(self) -> None:
        """Waits until everything is there."""
        self._run.finish()
