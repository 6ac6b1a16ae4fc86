"""A pytest plugin: Model Runner V2 on a CPU, its Triton kernels run by Triton's interpreter, which is slow.

>>> python -m pytest -p interpreted_triton tests/test_requests_engine.py        # with tests/ in PYTHONPATH

vLLM takes Triton on a CPU only where that has a backend for CPUs. The interpreter needs none, so one is pretended. All
of it must be so before anything imports Triton or vLLM, hence in a process of its own.
"""

import os
from types import SimpleNamespace


def interpret_triton() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from triton.backends import Backend, backends

    backends["cpu"] = Backend(compiler=backends["nvidia"].compiler, driver=SimpleNamespace(is_active=lambda: True))


interpret_triton()
