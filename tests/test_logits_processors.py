"""The logits processors of vLLM's two model runners follow their requests through every batch."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from search_oracle import EOS
from trie_walk import TRIE, VOCABULARY, masked, walk

from rollout.noise import uniform
from rollout.trie_mask import ENDED, LeftTrie, TrieRequest


@pytest.fixture(scope="module")
def trie_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trie") / "trie.arrow"
    TRIE.save(path)
    return path


@pytest.fixture(scope="module")
def vllm_config(trie_path: Path) -> Any:
    """The two fields of vLLM's configuration that the processors read."""
    settings = {"trie_path": str(trie_path), "logprob_space": "vocabulary"}
    return SimpleNamespace(additional_config=settings, speculative_config=None)


class Request:
    """One request of a simulated batch: where it stands, and what comes next by the plain walk."""

    def __init__(self, label: str, draw: np.random.Generator) -> None:
        nodes = [None, None, *range(TRIE.num_nodes)]
        temperature = float(draw.choice([0.0, 0.5, 2.0]))
        node, seed, sample = nodes[draw.integers(len(nodes))], int(draw.integers(2**63)), int(draw.integers(9))
        self.trie_request = TrieRequest(label, node, temperature, seed, sample)
        self.prompt = draw.integers(1, VOCABULARY, draw.integers(1, 6)).tolist()
        self.output: list[int] = []

    @property
    def node(self) -> int | None:
        node = self.trie_request.node
        return None if node is None else walk(TRIE, node, self.output)

    def params(self) -> Any:
        return SimpleNamespace(extra_args=self.trie_request.extra_args())

    def expected(self, logits: torch.Tensor) -> torch.Tensor:
        if self.node is None:
            return self.drawn(logits.log_softmax(0), logits)
        return self.drawn(masked(TRIE, self.node, logits, "vocabulary"), logits)

    def drawn(self, logprobs: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Only the sample: the first possible token at which the cumulative probability exceeds the random number."""
        request = self.trie_request
        if request.temperature == 0 or self.node == ENDED:
            return logprobs
        place = (torch.tensor(request.sample), torch.tensor(len(self.output)))
        number = float(uniform(torch.tensor(request.seed), *place))
        possible = torch.isfinite(logprobs).nonzero().flatten()
        cumulative = (logits[possible].double() / request.temperature).softmax(0).cumsum(0)
        token = possible[(cumulative > number).nonzero()[0, 0]]
        only = torch.full_like(logprobs, float("-inf"))
        only[token] = logprobs[token]
        return only

    def sample(self, row: torch.Tensor, draw: np.random.Generator) -> None:
        possible = torch.isfinite(row).nonzero().flatten().tolist()
        self.output.append(possible[draw.integers(len(possible))])


@pytest.mark.parametrize("seed", range(20))
def test_first_runner_follows_its_batch(vllm_config: Any, seed: int) -> None:
    """Requests come, go, and are moved and swapped in the batch; each row is masked for its own request."""
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from rollout.vllm_trie_v1 import TrieLogitsProcessor

    draw = np.random.default_rng(seed)
    processor = TrieLogitsProcessor(vllm_config, torch.device("cpu"), False)
    batch: list[Request] = []
    for step in range(30):
        removed = [i for i in range(len(batch)) if draw.random() < 0.2]
        kept: dict[int, Request] = {i: r for i, r in enumerate(batch) if i not in removed}
        added = []
        for k in range(draw.integers(0, 4)):
            free = min(set(range(len(kept) + 1)) - set(kept))
            kept[free] = Request(f"{step}-{k}", draw)
            request = kept[free]
            if draw.random() < 0.3 and request.node is not None:  # resumed after a preemption: with an output
                request.output.append(int(TRIE.children(request.node)[0][0]))
            added.append((free, request.params(), request.prompt, request.output))
        moved = []
        while kept and (highest := max(kept)) >= len(kept):  # fill the gaps from the end
            free = min(set(range(highest)) - set(kept))
            kept[free] = kept.pop(highest)
            moved.append((highest, free, MoveDirectionality.UNIDIRECTIONAL))
        if len(kept) > 1:
            a, b = draw.choice(len(kept), 2, replace=False).tolist()
            kept[a], kept[b] = kept[b], kept[a]
            moved.append((a, b, MoveDirectionality.SWAP))
        batch = [kept[i] for i in range(len(kept))]
        removed = [i for i in removed if i not in {index for index, *_ in added}]  # replaced ones are not reported
        processor.update_state(BatchUpdate(batch_size=len(batch), removed=removed, added=added, moved=moved))
        logits = torch.randn(len(batch), VOCABULARY, generator=torch.Generator().manual_seed(step)) * 3
        before = logits.clone()
        after = processor.apply(logits)
        for i, request in enumerate(batch):
            torch.testing.assert_close(after[i], request.expected(before[i]), atol=1e-5, rtol=1e-5)
            request.sample(after[i], draw)


def second_runner(vllm_config: Any, slots: int, width: int) -> tuple[Any, Any]:
    """(processor, its request states), with plain tensors where the runner has buffers."""
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcRequestState

    from rollout.vllm_trie_v2 import TrieLogitsProcessorV2

    def buffer(*shape: int) -> Any:
        tensor = torch.zeros(*shape, dtype=torch.int32)
        return SimpleNamespace(gpu=tensor, np=tensor.numpy())

    states = LogitsProcRequestState(
        device=torch.device("cpu"),
        max_num_reqs=slots,
        vocab_size=VOCABULARY,
        all_token_ids=buffer(slots, width),
        prompt_len=buffer(slots),
        prefill_len=buffer(slots),
        total_len=buffer(slots),
    )
    return TrieLogitsProcessorV2(vllm_config, states), states


def context(slots: list[int], lengths: list[int]) -> Any:
    """The fields of LogitsContext without speculative decoding: one row per request."""
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

    index = torch.tensor(slots)
    nothing = torch.zeros(len(slots), dtype=torch.int64)
    return LogitsContext(
        expanded_idx_mapping=index,
        idx_mapping=index,
        idx_mapping_np=np.asarray(slots),
        expanded_local_pos=nothing,
        input_ids=nothing,
        pos=torch.tensor(lengths) - 1,
        seq_lens_upper_bound_np=np.asarray(lengths, np.int32),
    )


@pytest.mark.parametrize("seed", range(20))
def test_second_runner_follows_its_slots(vllm_config: Any, seed: int) -> None:
    """Slots are recycled, rows reordered, prompts read in chunks, requests preempted and resumed in other slots."""
    draw = np.random.default_rng(seed)
    processor, states = second_runner(vllm_config, slots=12, width=64)
    running: dict[int, Request] = {}
    waiting: list[Request] = []
    for step in range(30):
        for slot in [slot for slot in running if draw.random() < 0.2]:
            request = running.pop(slot)
            if draw.random() < 0.5:
                waiting.append(request)
        for k in range(draw.integers(0, 4)):
            free = sorted(set(range(12)) - set(running))
            if free:
                slot = free[draw.integers(len(free))]
                running[slot] = request = waiting.pop() if waiting else Request(f"{step}-{k}", draw)
                states.prompt_len.np[slot] = len(request.prompt)
                states.all_token_ids.gpu[slot, : len(request.prompt + request.output)] = torch.tensor(
                    request.prompt + request.output, dtype=torch.int32
                )
                assert processor.add_request(slot, request.params())
        processor.apply_staged_writes()
        slots = draw.permutation(list(running)).tolist()
        if not slots:
            continue
        chunked = {slot for slot in slots if not running[slot].output and draw.random() < 0.3}
        lengths = [
            len(running[slot].prompt) - 1 if slot in chunked else len(running[slot].prompt + running[slot].output)
            for slot in slots
        ]
        logits = torch.randn(len(slots), VOCABULARY, generator=torch.Generator().manual_seed(step)) * 3
        before = logits.clone()
        after = processor.apply(logits, context(slots, lengths))
        for i, slot in enumerate(slots):
            request = running[slot]
            if slot not in chunked:  # the sampler throws these rows away
                torch.testing.assert_close(after[i], request.expected(before[i]), atol=1e-5, rtol=1e-5)
                request.sample(after[i], draw)
                states.all_token_ids.gpu[slot, len(request.prompt + request.output) - 1] = request.output[-1]


def outside(node: int) -> int:
    """A token that the trie does not allow at `node`."""
    return next(token for token in range(1, VOCABULARY) if TRIE.step(node, token) is None)


def test_a_row_that_left_the_trie_is_an_error_in_the_first_runner(vllm_config: Any) -> None:
    from vllm.v1.sample.logits_processor import BatchUpdate

    from rollout.vllm_trie_v1 import TrieLogitsProcessor

    processor = TrieLogitsProcessor(vllm_config, torch.device("cpu"), False)
    good = int(TRIE.children(0)[0][0])
    bad = outside(TRIE.step(0, good))
    params = SimpleNamespace(extra_args=TrieRequest("7 of prompt 3", 0).extra_args())
    processor.update_state(BatchUpdate(batch_size=1, removed=[], added=[(0, params, [5], [good, bad])], moved=[]))
    with pytest.raises(LeftTrie, match=f"request 7 of prompt 3: token {bad} at depth 1 is not allowed"):
        processor.apply(torch.zeros(1, VOCABULARY))


def test_a_row_that_left_the_trie_is_an_error_in_the_second_runner(vllm_config: Any) -> None:
    processor, states = second_runner(vllm_config, slots=4, width=16)
    bad = outside(0)
    states.prompt_len.np[2] = 1
    states.all_token_ids.gpu[2, :2] = torch.tensor([5, bad], dtype=torch.int32)
    processor.add_request(2, SimpleNamespace(extra_args=TrieRequest("7 of prompt 3", 0).extra_args()))
    processor.apply_staged_writes()
    with pytest.raises(LeftTrie, match=f"request 7 of prompt 3: token {bad} at depth 0 is not allowed"):
        processor.apply(torch.zeros(1, VOCABULARY), context([2], [2]))


def test_only_vllms_own_warm_up_comes_without_a_node(vllm_config: Any) -> None:
    processor, states = second_runner(vllm_config, slots=2, width=8)
    states.prompt_len.np[:] = 1
    processor.add_request(0, SimpleNamespace(extra_args=None))
    processor.apply_staged_writes()
    logits = torch.randn(1, VOCABULARY)
    torch.testing.assert_close(processor.apply(logits.clone(), context([0], [1])), logits.log_softmax(-1))
    processor.add_request(1, SimpleNamespace(extra_args=TrieRequest("a", 0).extra_args()))
    with pytest.raises(ValueError, match="must hold trie_node"):
        processor.add_request(0, SimpleNamespace(extra_args=None))


def test_after_the_end_only_the_end_is_left(vllm_config: Any) -> None:
    """A runner that schedules ahead asks once more for a row whose title has ended."""
    processor, states = second_runner(vllm_config, slots=1, width=32)
    title = TRIE.title_tokens(0)
    states.prompt_len.np[0] = 1
    states.all_token_ids.gpu[0, : 1 + len(title)] = torch.tensor([5, *title], dtype=torch.int32)
    processor.add_request(0, SimpleNamespace(extra_args=TrieRequest("a", 0).extra_args()))
    processor.apply_staged_writes()
    logits = processor.apply(torch.randn(1, VOCABULARY), context([0], [1 + len(title)]))
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [EOS]


def test_the_second_runner_refuses_speculative_decoding(vllm_config: Any) -> None:
    with pytest.raises(ValueError, match="speculative decoding must be off"):
        second_runner(SimpleNamespace(**{**vars(vllm_config), "speculative_config": object()}), 1, 1)


def test_both_processors_are_what_vllm_expects() -> None:
    """The interfaces that each model runner loads and calls; fails when one of them moves."""
    import inspect

    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

    from rollout.vllm_trie_v1 import TrieLogitsProcessor
    from rollout.vllm_trie_v2 import TrieLogitsProcessorV2

    for ours, theirs in ((TrieLogitsProcessor, LogitsProcessor), (TrieLogitsProcessorV2, LogitsProcessorV2)):
        assert issubclass(ours, theirs)
        assert not inspect.isabstract(ours)
        for name, method in inspect.getmembers(theirs, inspect.isfunction):
            expected = list(inspect.signature(method).parameters)
            assert list(inspect.signature(getattr(ours, name)).parameters) == expected, name
