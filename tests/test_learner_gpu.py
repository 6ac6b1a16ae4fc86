"""The learner on a GPU: flex attention and DeepSpeed's CUDA paths. Every step equals the same step on the CPU."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_gang
import numpy as np
import pytest
import ray
import torch
from learner_gang import Data, Process

from learner.config import LearnerConfig, LoraConfig, OptimizerConfig

learner_data = learner_gang.learner_data
pytestmark = pytest.mark.gpu
CONFIG = LearnerConfig(
    beta=0.05,
    micro_batch_tokens=600,
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.0, weight_decay=0.01),
)


def alone(data: Data, device: str) -> Any:
    """A process with one rank on "cuda" or on "cpu"."""
    environment = {"DS_ACCELERATOR": device, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    process = Process.options(runtime_env={"env_vars": environment}).remote()  # type: ignore[attr-defined]
    ray.get(process.join.remote(0, 1, ray.get(process.address.remote()), data))
    return process


@pytest.fixture(scope="module")
def devices(ray_session: None, learner_data: Data) -> Iterator[dict[str, Any]]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    made = {device: alone(learner_data, device) for device in ("cuda", "cpu")}
    yield made
    for process in made.values():
        ray.kill(process)


@pytest.mark.parametrize(
    "change",
    [
        *({"zero_stage": stage} for stage in range(4)),
        {"gradient_checkpointing": True},
        {"packing": "padded"},
        {"reference_offload": True},
        {"zero_stage": 2, "offload_optimizer": True},
        {"zero_stage": 3, "offload_optimizer": True},
        {"lora": LoraConfig(rank=4)},
        {"updates_per_batch": 2},
    ],
    ids=lambda change: ",".join(f"{name}={value}" for name, value in change.items()),
)
def test_steps_on_a_gpu_equal_those_on_the_cpu(
    devices: dict[str, Any], learner_data: Data, change: dict[str, Any]
) -> None:
    steps = [learner_data.tables(step) for step in range(3)]
    config = replace(CONFIG, **change)
    found, expected = (ray.get(devices[device].train.remote(config, steps)) for device in ("cuda", "cpu"))
    for mine, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        for name in ("loss", "kl", "grad_norm", "completion_tokens"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    assert found["sent"] == found["checksum"]
    start = ray.get(devices["cpu"].train.remote(config, []))["weights"]
    moved, error = (
        np.sqrt(sum(((found["weights"][n] - other[n]) ** 2).sum() for n in start))
        for other in (start, expected["weights"])
    )
    assert error < 1e-2 * moved


def test_bfloat16_on_a_gpu_moves_as_float32_does(devices: dict[str, Any], learner_data: Data) -> None:
    steps = [learner_data.tables(step) for step in range(3)]
    metrics = {
        dtype: ray.get(devices["cuda"].train.remote(replace(CONFIG, dtype=dtype, zero_stage=stage), steps))["metrics"]
        for dtype, stage in (("bfloat16", 2), ("float32", 0))
    }
    for mine, theirs in zip(metrics["bfloat16"], metrics["float32"], strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)


def test_a_run_on_a_gpu_goes_on_from_its_checkpoint(
    devices: dict[str, Any], learner_data: Data, tmp_path: Path
) -> None:
    steps = [learner_data.tables(step) for step in range(4)]
    saved = (2, str(tmp_path / "checkpoint"))
    whole = ray.get(devices["cuda"].train.remote(CONFIG, steps, save_at=saved))
    resumed = ray.get(devices["cuda"].train.remote(CONFIG, steps, load_at=saved))
    for name, weight in whole["weights"].items():
        np.testing.assert_allclose(resumed["weights"][name], weight, atol=1e-6, err_msg=name)


def test_sft_on_a_gpu_equals_that_on_the_cpu(devices: dict[str, Any], tmp_path: Path) -> None:
    losses = {
        device: [
            report["valid_loss"]
            for report in ray.get(process.sft.remote(CONFIG, str(tmp_path / device)))["reports"]
            if "valid_loss" in report
        ]
        for device, process in devices.items()
    }
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
