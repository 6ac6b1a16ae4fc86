"""The checksum notices every change, and parts of a tensor add up to it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.weights import WeightBucket, WeightsError, checksum, combine, elements_checksum, tensor_checksum


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (50, 8), "layer.q": (16, 8), "layer.k": (16, 8), "norm": (8,), "scale": ()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_buckets_keep_tensors_and_checksum(dtype: torch.dtype) -> None:
    named = tensors(dtype)
    bucket = WeightBucket.pack(named.items())
    for name, tensor in bucket.tensors():
        assert torch.equal(tensor, named[name])
    assert checksum(bucket.tensors()) == checksum(reversed(named.items()))


@given(name=st.sampled_from(["embed", "layer.q", "norm"]), place=st.integers(0, 10**6), bit=st.integers(0, 31))
def test_any_flipped_bit_changes_the_checksum(name: str, place: int, bit: int) -> None:
    named = tensors()
    before = checksum(named.items())
    bits = named[name].view(-1).view(torch.int32)
    bits[place % len(bits)] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    assert checksum(named.items()) != before


def test_exchanged_rows_columns_and_tensors_change_the_checksum() -> None:
    named = tensors()
    before = checksum(named.items())
    changed = [
        named | {"embed": named["embed"].flip(0)},
        named | {"embed": named["embed"].flip(1)},
        named | {"layer.q": named["layer.k"], "layer.k": named["layer.q"]},
        named | {"norm": named["norm"].flip(0)},
    ]
    assert len({before, *(checksum(other.items()) for other in changed)}) == 1 + len(changed)


@given(row=st.integers(0, 50), column=st.integers(0, 8))
def test_parts_add_up(row: int, column: int) -> None:
    tensor = tensors()["embed"]
    parts = [
        tensor_checksum("embed", tensor[:row]),
        tensor_checksum("embed", tensor[row:, :column], row_offset=row),
        tensor_checksum("embed", tensor[row:, column:], row_offset=row, column_offset=column),
    ]
    assert combine(parts) == checksum([("embed", tensor)])


@given(order=st.permutations(range(12)), zeros=st.integers(0, 3))
def test_the_elements_are_the_same_in_any_order_and_with_zeros_between(order: list[int], zeros: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = tensors(dtype)["embed"][:3, :4]
        moved = torch.cat([tensor.flatten()[order].view(2, 6), torch.zeros(zeros, 6, dtype=dtype)])
        assert elements_checksum(moved) == elements_checksum(tensor)
        assert elements_checksum(moved.T) == elements_checksum(tensor)


@given(place=st.integers(0, 399), bit=st.integers(0, 30), other=st.integers(0, 399))
def test_another_element_changes_the_checksum_of_elements(place: int, bit: int, other: int) -> None:
    tensor = tensors()["embed"]
    before = elements_checksum(tensor)
    changed, repeated = tensor.clone(), tensor.clone()
    changed.view(-1).view(torch.int32)[place] ^= 1 << bit
    repeated.view(-1)[place] = repeated.view(-1)[other]
    assert elements_checksum(changed) != before
    assert (elements_checksum(repeated) == before) == (place == other)


def test_a_short_bucket_is_an_error_that_names_the_tensor() -> None:
    bucket = WeightBucket.pack(tensors().items())
    short = WeightBucket(bucket.names, bucket.dtypes, bucket.shapes, bucket.data[:-1])
    with pytest.raises(WeightsError, match="scale"):
        list(short.tensors())
