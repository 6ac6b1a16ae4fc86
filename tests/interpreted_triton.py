"""A pytest plugin: Model Runner V2 on a CPU, its Triton kernels run by Triton's interpreter, which is slow.

>>> python -m pytest -p interpreted_triton tests/test_requests_engine.py        # with tests/ in PYTHONPATH

vLLM takes Triton on a CPU only where that has a backend for CPUs. The interpreter needs none, so one is pretended. All
of it must be so before anything imports Triton or vLLM, hence in a process of its own.
"""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest


def interpret_triton() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from triton.backends import Backend, backends

    any_compiler = next(iter(backends.values())).compiler
    backends["cpu"] = Backend(compiler=any_compiler, driver=SimpleNamespace(is_active=lambda: True))


@pytest.fixture(autouse=True)
def on_second_runner(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test has of engines is of V2, or it has shown nothing."""
    yield
    values: list[Any] = [request.getfixturevalue(name) for name in request.fixturenames if name.endswith("_engine")]
    assert all(engine._llm.llm_engine.vllm_config.use_v2_model_runner for engine in values)


interpret_triton()
