"""The times of phases add up, whatever device they are taken on."""

import pytest
import torch

from learner.phase_timer import PhaseTimer


def test_repeated_phases_add_up_and_nested_ones_count_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(6))
    monkeypatch.setattr("learner.phase_timer.time.perf_counter", lambda: float(next(ticks)))
    timer = PhaseTimer(torch.device("cpu"))
    with timer("learn"):
        for _ in range(2):
            with timer("forward"):
                pass
    assert timer.seconds() == {"forward": 2.0, "learn": 5.0}


@pytest.mark.gpu
def test_phases_on_cuda_last_as_long_as_the_device_takes() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    timer = PhaseTimer(torch.device("cuda", 0))
    with timer("learn"):
        with timer("short"):
            torch.cuda._sleep(10**6)
        with timer("long"):
            torch.cuda._sleep(10**8)
    seconds = timer.seconds()
    assert seconds["learn"] >= seconds["long"] > 10 * seconds["short"] > 0
