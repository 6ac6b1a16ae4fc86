"""Matrix products that torch would do more slowly: equal results, bounded memory."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner import products
from rollout.host_memory import host_environment
from tests.conftest import REPOSITORY


def output_and_gradients(linear: torch.nn.Linear, inputs: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    states = inputs.clone().requires_grad_()
    output = linear(states)
    linear.zero_grad()
    (output * weights).sum().backward()
    return [output, states.grad, *(parameter.grad for parameter in linear.parameters())]


@pytest.mark.parametrize("bias", [True, False])
def test_widened_products_are_those_of_bfloat16_to_its_rounding(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    linear = torch.nn.Linear(48, 40, bias=bias, dtype=torch.bfloat16)
    inputs = torch.randn(2, 30, 48, dtype=torch.bfloat16)
    weights = torch.randn(2, 30, 40, dtype=torch.bfloat16)
    results = []
    for widen in (False, True):
        if widen:
            products.use_best_products(linear)
        results.append(output_and_gradients(linear, inputs, weights))
    assert type(linear) is products.CpuLinear
    for narrow, wide in zip(*results, strict=True):
        assert wide.dtype == torch.bfloat16
        assert (wide.float() - narrow.float()).norm() < 5e-3 * narrow.float().norm()


def test_a_cpu_with_bfloat16_instructions_is_left_to_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(1, dtype=torch.bfloat16)
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(products, "has_bfloat16", lambda native=native: native)
        assert products.widened(weight).dtype == expected
        assert products.widened(weight.float()).dtype == torch.float32


needs_onednn = pytest.mark.skipif(not products.prefers_onednn(), reason="float32 is not multiplied by oneDNN here")


@pytest.mark.parametrize("bias", [True, False])
def test_onednn_products_equal_those_of_torch(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere at least their padding is compared."""
    if not products.prefers_onednn():
        monkeypatch.setattr(products, "onednn_products", nullcontext)
    linear = torch.nn.Linear(48, 40, bias=bias)
    inputs, weights = torch.randn(2, 30, 48), torch.randn(2, 30, 40)
    results = []
    for onednn in (False, True):
        monkeypatch.setattr(products, "prefers_onednn", lambda onednn=onednn: onednn)
        products.use_best_products(linear)
        results.append(output_and_gradients(linear, inputs, weights))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_float32_stays_float32_where_onednn_multiplies_it() -> None:
    """On this machine, whatever it is: rounded to bfloat16, the products would differ by 1e-3."""
    left, right = torch.randn(96, 64), torch.randn(64, 80)
    with products.best_products(left):
        found = left @ right
    torch.testing.assert_close(found, left @ right, rtol=1e-5, atol=1e-5)
    assert torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")


def test_a_processor_whose_onednn_rounds_is_not_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {**torch.cpu.get_capabilities(), "amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert not products.prefers_onednn.__wrapped__()


@given(st.integers(1, 100_000))
def test_rounded_rows_are_few_and_little_more(rows: int) -> None:
    rounded = products.rounded_rows(rows)
    assert rows <= rounded < rows + max(16, rows / 16 + 1)
    assert products.rounded_rows(rounded) == rounded


def test_few_sizes_of_products_are_compiled() -> None:
    assert len({products.rounded_rows(rows) for rows in range(1, 4097)}) <= 32 + 3 * 16


_MANY_SHAPES = """
import sys
import psutil, torch
from learner import products

if sys.argv[1] == "as they are":
    products.rounded_rows = lambda rows: rows
weights = [torch.randn(size, 128) for size in (128, 384, 512)]
held = []
for first, last in ((1, 100), (100, 700)):
    for rows in range(first, last):
        for weight in weights:
            products.linear(torch.randn(rows, 128), weight)
    held.append(psutil.Process().memory_info().rss / 2**20)
print(held[1] - held[0])
"""


@needs_onednn
def test_memory_does_not_grow_with_the_shapes_that_were_multiplied() -> None:
    """Packed rows have another length in every step, and oneDNN never forgets some of what it compiles for each."""
    grown = {}
    for rows in ("as they are", "rounded"):
        run = subprocess.run(
            [sys.executable, "-c", _MANY_SHAPES, rows],
            capture_output=True,
            text=True,
            check=True,
            cwd=REPOSITORY,
            env={**os.environ, **host_environment()},
        )
        grown[rows] = float(run.stdout)
    assert grown["rounded"] < 100 < grown["as they are"], grown
