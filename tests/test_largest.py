"""The first of the largest values: what a stable sort says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.largest import first_largest

FEW = st.sampled_from([-np.inf, -3.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, np.inf])
FLOATS = st.floats(width=32, allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(rows=st.integers(1, 6), width=st.integers(1, 20), keep=st.integers(1, 25), data=st.data())
def test_it_is_what_a_stable_sort_begins_with(
    dtype: torch.dtype, rows: int, width: int, keep: int, data: st.DataObject
) -> None:
    drawn = data.draw(st.lists(FEW | FLOATS, min_size=rows * width, max_size=rows * width))
    values = torch.tensor(drawn, dtype=dtype).view(rows, width)
    expected = values.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    assert torch.equal(first_largest(values, keep), expected)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_is_never_left_out(dtype: torch.dtype, sign: int) -> None:
    values = torch.tensor([[1.0, 0.0, -np.inf]], dtype=dtype)
    values[0, 1] = torch.copysign(torch.tensor(torch.nan), torch.tensor(float(sign)))
    assert bool(torch.signbit(values[0, 1])) == (sign < 0)
    assert first_largest(values, 2).tolist() == [[1, 0]]


def test_all_equal_values_stay_in_their_order() -> None:
    assert first_largest(torch.zeros(2, 70_000), 3).tolist() == [[0, 1, 2]] * 2
