"""Memory of a learner with adapters, whose reference is adapters alone, or a second model.

>>> python -m benchmarks.adapter_reference models/smollm2-135m

One rank in float32 without ZeRO. Each side is a process of its own that makes two steps on the same synthetic groups.
"""

import socket
import sys
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.harness import threads
from benchmarks.learner import synthetic_groups
from benchmarks.sides import Side
from catalog.build import build_catalog
from catalog.config import DataConfig, GeneratedConfig
from learner.config import LearnerConfig, LoraConfig
from rollout.groups import Candidates, group_table

SIDES = {"adapters": 0, "second model": 512}
"""Steps between two updates of the reference: one that moves in part has to be a model."""


class OneRank:
    """A learner and the table that it learns from."""

    def __init__(self, model_path: str, reference_sync_every: int) -> None:
        from learner.engine import join_process_group
        from learner.learner import Learner

        torch.set_num_threads(threads())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        device = join_process_group(0, 1, "127.0.0.1", port, 600.0)
        with TemporaryDirectory() as folder:
            generated = DataConfig(cache=folder, generated=GeneratedConfig(items=40, users=40))
            catalog = build_catalog(generated, model_path)
        config = LearnerConfig(
            lora=LoraConfig(rank=16), reference_sync_every=reference_sync_every, micro_batch_tokens=1024
        )
        self._learner = Learner(model_path, catalog, config, "vocabulary", 10, 0, device)
        self._learner.return_freed_memory()
        self._table = _table()

    def step(self) -> dict[str, Any]:
        return self._learner.step([self._table])


def _table() -> pa.Table:
    groups = synthetic_groups(40000, groups=2)
    found = [
        Candidates(
            [np.asarray(row, np.int32) for row in group["candidates"]],
            [np.zeros(len(row), np.float32) for row in group["candidates"]],
            np.arange(len(group["candidates"]), dtype=np.int32),
            np.zeros(len(group["candidates"]), np.float32),
        )
        for group in groups
    ]
    table = group_table([0, 1], 0, [group["prompt"] for group in groups], [0, 0], found)
    rewards = np.eye(1, len(found[0].tokens), dtype=np.float32)[0]
    return table.append_column("reward", pa.array([rewards] * len(groups), pa.list_(pa.float32())))


def main(model_path: str) -> None:
    for name, every in SIDES.items():
        with Side("benchmarks.adapter_reference:OneRank", model_path, every, as_worker=True) as side:
            side.call("step")
            call = side.call("step")
        print(
            f"{name}: {call.idle_gib:.2f} GiB when loaded, {call.peak_gib:.2f} GiB at most, "
            f"reference {call.result['seconds/reference']:.2f} s of a step of {call.result['seconds/learn']:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
