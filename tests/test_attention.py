"""The two attention kernels for packed trees against each other."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from learner import attention, tree_mask
from learner.attention import flex_kernel_options, flex_tree_attention, tree_attention, window_of_mask
from learner.packing import pack_groups
from learner.tree_mask import TreeMask
from tests.test_packing import large_groups, split, whole_blocks

SHAPES = pytest.mark.parametrize(
    ("heads", "key_heads", "softcap", "window"), [(14, 2, None, None), (14, 2, 2.0, 40), (4, 4, None, 40)]
)


def attend(
    heads: int, key_heads: int, softcap: float | None, window: int | None, device: str
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Outputs [1, N, H, D] of flex attention on a device and of runs on the CPU, and their common inputs there."""
    batch = pack_groups(*split(large_groups(2)), whole_blocks)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, count, batch.tokens.shape[1], 32, generator=generator) for count in (heads, key_heads)]
    inputs = [tensor.requires_grad_(device != "cpu") for tensor in (*inputs, inputs[1].flip(2))]
    tree = TreeMask(batch.subtree_end, batch.positions[0])
    expected, _ = tree_attention(nn.Module(), *inputs, None, softcap=softcap, sliding_window=window, tree=tree)
    there = TreeMask(batch.subtree_end.to(device), batch.positions[0].to(device)).block_mask(window)
    found = flex_tree_attention(*(tensor.to(device) for tensor in inputs), there, None, softcap).cpu()
    fed = slice(0, batch.fed_tokens)  # what padding sees is nobody's concern
    return found[:, fed], expected[:, fed], inputs


@SHAPES
def test_flex_attention_equals_that_of_runs(
    heads: int, key_heads: int, softcap: float | None, window: int | None
) -> None:
    with torch.compiler.set_stance("force_eager"):
        found, expected, _ = attend(heads, key_heads, softcap, window, "cpu")
    torch.testing.assert_close(found, expected)


@SHAPES
@pytest.mark.parametrize(("rounded", "kept"), [(False, 0), (True, 10**6), (False, 10**9)])
def test_runs_and_their_gradients_equal_dense_attention(
    heads: int,
    key_heads: int,
    softcap: float | None,
    window: int | None,
    rounded: bool,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tree_mask, "KEPT", kept)
    monkeypatch.setattr(attention, "compiles_every_length", lambda _: rounded)
    batch = pack_groups(*split(large_groups(2)))
    size, generator = batch.fed_tokens, torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, n, size, 32, generator=generator, requires_grad=True) for n in (heads, key_heads, key_heads)
    ]
    tree = TreeMask(batch.subtree_end, batch.positions[0])
    found, _ = tree_attention(nn.Module(), *inputs, None, softcap=softcap, sliding_window=window, tree=tree)

    query, *others = (tensor.detach().double().requires_grad_() for tensor in inputs)
    key, value = (tensor.repeat_interleave(heads // key_heads, 1) for tensor in others)
    scores = query @ key.transpose(2, 3) * 32**-0.5
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    place, position = torch.arange(size), batch.positions[0]
    sees = (place <= place[:, None]) & (place[:, None] < batch.subtree_end)
    sees &= position[:, None] - position < (window or size)
    expected = (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    weights = torch.randn(found.shape, generator=generator)
    mine = torch.autograd.grad((found * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), (query, *others))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=5e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_of_all_layers_no_more_weights_are_kept_than_may_be(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_be = 10**6
    monkeypatch.setattr(tree_mask, "KEPT", may_be)
    batch = pack_groups(*split(large_groups(2)))
    tree = TreeMask(batch.subtree_end, batch.positions[0])
    query = torch.randn(1, 4, batch.fed_tokens, 32, requires_grad=True)
    layers = [tree_attention(nn.Module(), query, query, query, None, softcap=softcap, tree=tree)[0] for _ in range(3)]
    nodes: list[Any] = [layer.grad_fn for layer in layers]
    kept = sum(part.numel() for node in nodes for pair in node.kept.values() for part in pair if part is not None)
    assert 0 < kept <= may_be < sum(run.mask.numel() * 4 for run in tree.runs(None, 4, 4)) * 3
    assert not tree.reserve(may_be - kept + 1)
    torch.stack(layers).sum().backward()
    assert not any(node.kept for node in nodes)
    assert tree.reserve(may_be)


def test_the_window_of_a_mask_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most models name their window by the mask of a layer; torch.compile traces what flex attention does with it."""
    monkeypatch.setattr(attention, "flex_tree_attention", lambda query, key, value, blocks, *_: blocks)
    tree = TreeMask(torch.full((256,), 256), torch.arange(256))
    on_cuda: Any = SimpleNamespace(is_cuda=True)
    blocks: Any = tree_attention(nn.Module(), on_cuda, on_cuda, on_cuda, window_of_mask(local_size=40), tree=tree)[0]
    query, key = torch.tensor([99, 100]), torch.tensor([60, 60])
    visible = torch.compile(blocks.mask_mod, backend="eager", fullgraph=True)(0, 0, query, key)
    assert visible.tolist() == [True, False]


@pytest.mark.gpu
@SHAPES
def test_flex_attention_on_cuda_and_its_gradients_equal_those_of_runs(
    heads: int, key_heads: int, softcap: float | None, window: int | None
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found, expected, inputs = attend(heads, key_heads, softcap, window, "cuda")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((output * weights).sum(), inputs) for output in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("head_size", "element_size", "kib", "changed"),
    [
        (64, 2, 99, {}),
        (128, 2, 99, {"bwd_num_warps": 8}),
        (256, 2, 227, {"bwd_num_warps": 8}),
        (256, 2, 99, {"fwd_num_stages": 1, "bwd_num_stages": 1, "bwd_BLOCK_M1": 32}),
        (64, 4, 163, {"fwd_num_warps": 8, "bwd_num_warps": 8}),
        (96, 4, 163, {"fwd_BLOCK_M": 32, "fwd_num_stages": 2, "fwd_num_warps": 8}),
        (256, 4, 99, {"fwd_BLOCK_M": 32, "fwd_num_stages": 1, "bwd_num_warps": 8}),
    ],
)
def test_flex_kernels_of_wide_heads_get_what_they_need(
    head_size: int, element_size: int, kib: int, changed: dict[str, int]
) -> None:
    options = flex_kernel_options(head_size, element_size, kib * 1024) or {}
    assert changed.items() <= options.items()
    assert bool(options) == bool(changed)
