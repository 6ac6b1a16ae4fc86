"""Float32 copies of bfloat16 weights, stepped as lists, against one tensor after the other."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner import master_weights
from learner.master_weights import step_master_weights

SHAPES = [(7, 5), (11,), (3, 4, 2)]


def optimizer_of(seed: int, dtype: torch.dtype, clip: float) -> SimpleNamespace:
    """What step_master_weights knows of DeepSpeed's optimizer; the second weight has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    masters = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
    weights = [master.detach().bfloat16().requires_grad_() for master in masters]
    for weight in (weights[0], weights[2]):
        weight.grad_dtype = dtype
        weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
    skipped = SimpleNamespace(count=0)

    def skip() -> bool:
        skipped.count += 1
        return True

    return SimpleNamespace(
        fp32_groups=[masters[:2], masters[2:]],
        fp16_groups=[weights[:2], weights[2:]],
        optimizer=torch.optim.AdamW(masters, lr=0.1, weight_decay=0.01),
        clip_grad=clip,
        skipped=skipped,
        _skip_invalid_grad_norm=skip,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [0.0, 0.3, 1e3])
@pytest.mark.parametrize("elements", [1, 40, 50, 1 << 24])
def test_a_step_equals_plain_pytorch(
    dtype: torch.dtype, clip: float, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(master_weights, "_ON_CPU", elements)
    found, plain = optimizer_of(0, dtype, clip), optimizer_of(0, dtype, clip)
    assert step_master_weights(found) is False
    masters, weights = (
        [tensor for group in groups for tensor in group] for groups in (plain.fp32_groups, plain.fp16_groups)
    )
    for master, weight in zip(masters, weights, strict=True):
        master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()
    norm = torch.nn.utils.clip_grad_norm_(masters, clip or float("inf"))
    plain.optimizer.step()
    assert found._global_grad_norm == pytest.approx(float(norm))
    for group, master in zip((t for g in found.fp32_groups for t in g), masters, strict=True):
        torch.testing.assert_close(group, master)
        assert group.grad is None
    for weight, master in zip((t for g in found.fp16_groups for t in g), masters, strict=True):
        assert torch.equal(weight, master.bfloat16())


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 30))
def test_pieces_are_bounded_and_no_smaller_than_they_must_be(sizes: list[int], elements: int) -> None:
    weights = [torch.empty(size) for size in sizes]
    pieces = list(master_weights._pieces(weights, elements))
    assert [i for piece in pieces for i in range(len(sizes))[piece]] == list(range(len(sizes)))
    totals = [sum(sizes[piece]) for piece in pieces]
    for piece, total in zip(pieces, totals, strict=True):
        assert total <= elements or piece.stop - piece.start == 1
    for piece, total in zip(pieces[1:], totals, strict=False):
        assert total + sizes[piece.start] > elements


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    optimizer = optimizer_of(1, torch.float32, 0.3)
    optimizer.fp16_groups[1][0].grad[0] = float("nan")
    before = [tensor.detach().clone() for group in optimizer.fp32_groups for tensor in group]
    assert step_master_weights(optimizer) is True
    assert optimizer.skipped.count == 1
    assert all(
        torch.equal(old, new) for old, new in zip(before, (t for g in optimizer.fp32_groups for t in g), strict=True)
    )
