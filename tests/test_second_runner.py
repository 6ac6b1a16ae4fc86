"""The requests engine on vLLM's Model Runner V2, without a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import REPOSITORY

EXACT = [
    "test_requests_engine.py::test_64_ragged_groups_equal_the_plain_search[2]",
    "test_requests_engine.py::test_new_weights_change_the_groups",
    "test_requests_engine.py::test_a_search_that_breaks_off_leaves_no_requests[beam-step]",
    "test_requests_engine_samples.py::test_sampled_log_probabilities_are_those_of_the_policy_at_temperature_1",
    "test_requests_engine_samples.py::test_unconstrained_candidates_have_full_log_probabilities_and_are_classified",
]
"""Of the requests engine's tests on V1; the others pass as well, in ten minutes."""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it by itself: test_requests_engine.py")
@pytest.mark.timeout(900)
def test_the_requests_engine_is_exact_on_model_runner_v2() -> None:
    tests = REPOSITORY / "tests"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "interpreted_triton",
        *(str(tests / name) for name in EXACT),
    ]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tests}"}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert f"\n{len(EXACT)} passed" in run.stdout
