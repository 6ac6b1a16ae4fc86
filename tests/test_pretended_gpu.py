"""Code for a GPU, run where there is none: the CPU's results, no tensor of the host beside those of the device."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from pretended_gpu import PretendedGpu, PretendedTensor, pretended_gpu
from search_oracle import random_trie
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from trie_walk import TRIE, VOCABULARY

from catalog.trie import Trie
from learner import attention
from learner.policy import CUDA_BUCKET, Policy
from learner.tree_mask import BLOCK
from rollout import vllm_layout
from rollout.config import LogprobSpace
from rollout.device_trie import DeviceTrie
from rollout.free_sampling import FreeSampleSearch
from rollout.frontier import TrieSearch
from rollout.groups import Candidates
from rollout.sampling import SampleSearch
from rollout.search import BeamSearch
from rollout.stochastic import StochasticBeamSearch
from rollout.trie_mask import ENDED, Sampling, TrieMask, TrieRequest
from rollout.vllm_internals import PagedModel, stacked
from rollout.weights import WeightBucket, elements_checksum, tensor_checksum
from tests.test_policy import EOS, groups, language_model

GROUPS, BEAMS, WIDTH = 5, 8, 30

SEARCHES: dict[str, Callable[[DeviceTrie, LogprobSpace], TrieSearch]] = {
    "beam": lambda trie, space: BeamSearch(trie, GROUPS, BEAMS, space),
    "beam-token-by-token": lambda trie, space: BeamSearch(trie, GROUPS, BEAMS, space, "token_by_token"),
    "sample": lambda trie, space: SampleSearch(trie, range(GROUPS), BEAMS, 0.7, space),
    "stochastic-beam": lambda trie, space: StochasticBeamSearch(trie, range(GROUPS), BEAMS, 0.7, space),
    "unconstrained": lambda trie, space: FreeSampleSearch(trie, range(GROUPS), BEAMS, 0.7, 9),
}


def search(made: TrieSearch, logits: torch.Tensor, gpu: PretendedGpu | None = None) -> list[Candidates]:
    """The candidates where a model answers logits[group, node]; on a GPU a step waits for the device once."""
    while True:
        before = len(gpu.waits) if gpu else 0
        frontier = made.frontier()
        if not frontier.size:
            return made.results()
        group = torch.from_numpy(np.repeat(frontier.slot // made.beams, frontier.count))
        group = group.to(logits.device, non_blocking=True)
        made.advance(frontier, made.children(frontier, slice(None), logits[group, frontier.node]))
        assert gpu is None or len(gpu.waits) - before <= 1


def test_what_a_gpu_refuses_is_refused() -> None:
    with pretended_gpu() as gpu:
        there = torch.arange(4, device="cuda")
        assert there.is_cuda
        assert (there * torch.tensor(2) + 1).device.type == "cuda"
        for wrong in (lambda: there + torch.arange(4), lambda: there[torch.arange(2)], lambda: there.numpy()):
            with pytest.raises((RuntimeError, TypeError), match="GPU"):
                wrong()
        assert not gpu.waits
        assert there[there > 1].tolist() == [2, 3]
        assert int(there.sum()) == 6
        assert gpu.waits == ["__getitem__", "tolist", "__int__"]


def test_copies_that_the_host_waits_for_are_counted() -> None:
    host, waits = torch.arange(4), ["to", "tensor", "as_tensor", "copy_", "copy_", "cpu"]
    with pretended_gpu() as gpu:
        there = host.to("cuda", non_blocking=True)
        there.copy_(host, non_blocking=True)
        there.to("cuda").copy_(there)
        torch.as_tensor(there, device="cuda")
        assert not gpu.waits
        host.to("cuda")
        torch.tensor([1, 2], device="cuda")
        torch.as_tensor(1.0, device="cuda")
        there.copy_(host)
        host.clone().copy_(there)
        there.cpu()
        assert gpu.waits == waits


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("space", ["vocabulary", "trie"])
@pytest.mark.parametrize("strategy", SEARCHES)
def test_searches(strategy: str, space: LogprobSpace, seed: int) -> None:
    trie = random_trie(seed, 60, WIDTH, 10)
    logits = torch.randn(GROUPS, trie.num_nodes, WIDTH, generator=torch.Generator().manual_seed(seed))
    expected = search(SEARCHES[strategy](DeviceTrie.of(trie), space), logits)
    with pretended_gpu() as gpu:
        found = search(SEARCHES[strategy](DeviceTrie.of(trie, "cuda"), space), logits.to("cuda"), gpu)
    for mine, others in zip(found, expected, strict=True):
        assert mine.item_class.tolist() == others.item_class.tolist()
        assert [row.tolist() for row in mine.tokens] == [row.tolist() for row in others.tokens]
        np.testing.assert_allclose(mine.score, others.score, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", ["vocabulary", "trie"])
def test_the_trie_mask_waits_for_the_device_once(space: LogprobSpace) -> None:
    nodes = torch.cat([torch.arange(TRIE.num_nodes), torch.tensor([ENDED, ENDED])]).repeat(3)
    tokens = torch.arange(len(nodes)) % VOCABULARY
    logits = torch.randn(len(nodes), VOCABULARY, generator=torch.Generator().manual_seed(0))
    rows = torch.randperm(len(nodes), generator=torch.Generator().manual_seed(1))
    requests = [TrieRequest("a", 0, (0.0, 0.8)[i % 2], i, i) for i in range(len(nodes))]

    def walked(device: str) -> list[torch.Tensor]:
        there, mask = torch.device(device), TrieMask(DeviceTrie.of(TRIE, device), space)
        sampling = Sampling.of(requests, [0] * len(nodes), there)
        inputs = (logits, logits, rows, nodes, tokens)
        constrained, free, *places = (values.to(there, non_blocking=True, copy=True) for values in inputs)
        row, node, token = places
        mask.constrain_(constrained, row, node, sampling)
        mask.normalise_(free, row, sampling)
        return [constrained, free, mask.step(node, token)]

    expected = walked("cpu")
    with pretended_gpu() as gpu:
        found = walked("cuda")
        assert gpu.waits == ["__int__", "tolist"]  # of the trie's largest fan-out, then of the allowed tokens
    for mine, others in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.host, others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_the_same_checksums_on_a_gpu_and_leave_it_in_buckets(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    place = {"row_offset": 8, "column_offset": 4}
    expected = tensor_checksum("a", weight, **place), elements_checksum(weight)
    bucket = WeightBucket.pack([("a", weight), ("b", weight.T)])
    waited: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    with pretended_gpu() as gpu:
        there = weight.to("cuda")
        assert (tensor_checksum("a", there, **place), elements_checksum(there)) == expected
        gpu.waits.clear()
        np.testing.assert_array_equal(WeightBucket.pack([("a", there), ("b", there.T)]).data, bucket.data)
        assert waited == ["stream"]
        assert not gpu.waits


def test_weights_that_arrived_are_summed_up_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer that holds its matrix transposed, so that it is compared by its elements."""
    arrived, layer = {"weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))}, nn.Linear(6, 4)
    part = vllm_layout._Part
    monkeypatch.setattr(vllm_layout, "_parts", lambda model, name, layer, tensor: [part("weight", tensor)])
    move(layer)
    with pretended_gpu():
        held = vllm_layout.HeldWeights(layer, by_place=False)
        held.note("", layer, "weight", arrived["weight"].T.to("cuda"))

        def summing(summed: Callable[..., int]) -> Callable[..., int]:
            def on_gpu(*arguments: Any) -> int:
                assert arguments[-1].is_cuda
                return summed(*arguments)

            return on_gpu

        for name in ("tensor_checksum", "elements_checksum"):
            monkeypatch.setattr(vllm_layout, name, summing(getattr(vllm_layout, name)))
        assert held.checksum(arrived) == tensor_checksum("weight", arrived["weight"])
    assert not held.by_place


def caches_of(layout: str) -> list[torch.Tensor]:
    """Of 3 layers, [12, 2, 16, 8] each, the heads of a token beside each other: views that are not contiguous."""
    memory = torch.randn(3, 12, 16, 2, 8, generator=torch.Generator().manual_seed(0))
    if layout == "block-behind-block":
        memory = memory.transpose(0, 1).contiguous().transpose(0, 1)
    layers = [memory[2], memory[0], memory[1]]
    if layout == "apart":
        layers = [layer.clone() for layer in layers]
    return [layer.transpose(1, 2) for layer in layers]


@pytest.mark.parametrize("destination", [[5, 6, 7], [9, 5, 7]])
@pytest.mark.parametrize("layout", ["layer-behind-layer", "block-behind-block", "apart", "one", "shared"])
def test_blocks_are_copied_in_the_layouts_that_a_gpu_has(layout: str, destination: list[int]) -> None:
    """With one launch to read and one to write all layers, where they lie in one memory at equal distances."""
    caches = caches_of(layout)
    caches = {"one": caches[:1], "shared": [*caches, caches[0]]}.get(layout, caches)
    expected = [cache.clone() for cache in caches]
    for cache, before in zip(expected, caches, strict=True):
        cache[destination] = before[[7, 1, 5]]
    with pretended_gpu() as gpu:
        model = PagedModel.__new__(PagedModel)
        model.device = torch.device("cuda")
        model._runner = SimpleNamespace(kv_caches=[PretendedTensor(cache) for cache in caches])
        assert (stacked(model._runner.kv_caches[:3]) is None) == (layout == "apart")
        model.copy_blocks(np.array([7, 1, 5]), np.array(destination))
        assert not gpu.waits
    for cache, others in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache, others, rtol=0, atol=0)


def test_caches_at_uneven_distances_are_not_stacked() -> None:
    memory = torch.zeros(100)
    assert stacked([memory[:10], memory[10:20], memory[25:35]]) is None
    assert stacked([memory[:10], memory[10:20], memory[20:31]]) is None
    assert stacked([memory[:10], memory[10:20], torch.zeros(10)]) is None
    found = stacked([memory[60:70], memory[20:30], memory[40:50]])
    assert found is not None
    assert found.shape == (3, 10)


def move(lm: nn.Module) -> None:
    """To the pretended GPU, in place."""
    for module in lm.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: PretendedTensor(t.detach()) for name, t in tensors.items() if t is not None})


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor] | None,
    block_mask: BlockMask,
    scale: float | None,
    **_: Any,
) -> torch.Tensor:
    """What flex attention computes: of the listed blocks alone, by `mask_mod` within those that are not full."""
    key, value = (rows.repeat_interleave(query.shape[1] // key.shape[1], 1) for rows in (key, value))
    scores = query @ key.transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
    if score_mod is not None:
        scores = score_mod(scores)
    every = torch.arange(query.shape[2], device=query.device)
    listed = block_mask.to_dense()[0, 0].bool().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    listed = listed.to(query.device, non_blocking=True)
    visible = block_mask.mask_mod(every, every, every[:, None], every) & listed
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value


def host_block_mask(*blocks: torch.Tensor, **others: Any) -> BlockMask:
    """torch's own code for block masks maps over them in a way that cannot be pretended."""
    return BLOCK_MASK(*(cast(PretendedTensor, tensor).host for tensor in blocks), **others)


BLOCK_MASK = BlockMask.from_kv_blocks


@pytest.mark.parametrize("space", ["vocabulary", "trie"])
@pytest.mark.parametrize("name", ["qwen2", "gemma2-sliding-softcap", "cohere2-scaled-logits"])
def test_the_policy(name: str, space: LogprobSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, (prompts, candidates) = language_model(name), groups()
    candidates = [[row for row in rows if row[-1] == EOS] for rows in candidates]
    titles = {tuple(row.tolist()) for rows in candidates for row in rows}
    trie = Trie.from_titles(sorted(map(list, titles)), eos_token=EOS, tokenizer_fingerprint="")
    policy = Policy(lm, trie=trie if space == "trie" else None)
    with torch.inference_mode():
        expected = policy(policy.pack(prompts, candidates))
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: dense_attention)
    monkeypatch.setattr(attention, "_kernel_options", lambda query: None)
    monkeypatch.setattr(BlockMask, "from_kv_blocks", host_block_mask)
    move(lm)
    with pretended_gpu() as gpu:
        batch = policy.pack(prompts, candidates)
        assert batch.tokens.is_cuda
        assert batch.tokens.shape[1] % CUDA_BUCKET == 0
        found = policy(batch)
        assert not gpu.waits
    torch.testing.assert_close(found.host, expected, rtol=1e-4, atol=1e-5)
