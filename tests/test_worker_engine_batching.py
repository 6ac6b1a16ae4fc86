"""How the worker engine cuts, pads and spreads its passes changes nothing; what does not fit is refused."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from engine_oracle import generate, ragged_prompts, worker_of

from rollout.base_engine import BaseEngine
from rollout.config import RolloutConfig, Strategy
from rollout.finite import LogitsError
from rollout.groups import Candidates
from rollout.kv_blocks import BeamBlocks
from rollout.vllm_arguments import EngineError
from rollout.vllm_internals import (
    ENGINE_NAMES,
    LOADING_NAMES,
    RUNNER_NAMES,
    WORKER_NAMES,
    PagedModel,
    UnsupportedModelError,
)
from rollout.vllm_weights import WeightsWorker
from rollout.worker_engine import WorkerEngine


def paged_model(engine: Any) -> PagedModel:
    return worker_of(engine).paged_model


@pytest.mark.parametrize(("setting", "value"), [("max_batched_tokens", 48), ("num_blocks", 150)])
def test_chunks_and_batches_change_nothing(
    worker_engine: Any, monkeypatch: pytest.MonkeyPatch, setting: str, value: int
) -> None:
    prompts = ragged_prompts(24)
    whole = generate(worker_engine, prompts, 16)
    monkeypatch.setattr(paged_model(worker_engine), setting, value)
    for one, other in zip(whole, generate(worker_engine, prompts, 16), strict=True):
        assert one.item_class.tolist() == other.item_class.tolist()
        np.testing.assert_allclose(one.score, other.score, atol=1e-4)


@pytest.mark.parametrize("destination", [[5, 6, 7], [9, 5, 7]])
def test_blocks_are_copied_wherever_they_go(worker_engine: Any, destination: list[int]) -> None:
    source, caches = [8, 1, 4], paged_model(worker_engine)._runner.kv_caches
    for cache in caches:
        cache.normal_()
    expected = [cache[source] for cache in caches]
    paged_model(worker_engine).copy_blocks(np.array(source), np.array(destination))
    for cache, blocks in zip(caches, expected, strict=True):
        assert torch.equal(cache[destination], blocks)


def test_passes_padded_to_a_captured_size_change_nothing(worker_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where CUDA graphs of fixed sizes are replayed: tokens beyond the batch are what an earlier pass left."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor, get_forward_context

    sizes: list[tuple[int, int]] = []
    runner = paged_model(worker_engine)._runner

    def dispatch(tokens: int, **_: Any) -> tuple[CUDAGraphMode, BatchDescriptor]:
        sizes.append((tokens, min(-(-tokens // 64) * 64, 1024)))
        runner.is_padding.fill_(True)  # as vLLM's warm-up leaves it
        return CUDAGraphMode.PIECEWISE, BatchDescriptor(sizes[-1][1])

    def forward(**inputs: Any) -> torch.Tensor:
        tokens, padded = sizes[-1]
        assert runner.is_padding[:padded].tolist() == [place >= tokens for place in range(padded)]
        assert get_forward_context().is_padding.data_ptr() == runner.is_padding.data_ptr()
        return plain(**inputs)

    prompts, plain = ragged_prompts(64), runner.model.forward
    expected = generate(worker_engine, prompts, 16)
    monkeypatch.setattr(runner.cudagraph_dispatcher, "dispatch", dispatch)
    monkeypatch.setattr(runner.model, "forward", forward)
    for one, other in zip(generate(worker_engine, prompts, 16), expected, strict=True):
        assert one.item_class.tolist() == other.item_class.tolist()
        np.testing.assert_allclose(one.score, other.score, atol=1e-4)
    assert any(tokens < padded for tokens, padded in sizes)


def test_scoring_forced_chains_at_once_changes_nothing(worker_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ragged_prompts(24)
    at_once = generate(worker_engine, prompts, 16)
    monkeypatch.setattr(worker_of(worker_engine).rollout_config, "forced_chains", "token_by_token")
    for one, other in zip(at_once, generate(worker_engine, prompts, 16), strict=True):
        assert one.item_class.tolist() == other.item_class.tolist()
        np.testing.assert_allclose(one.score, other.score, atol=1e-4)


def test_two_tensor_parallel_ranks_find_the_same_hold_all_weights_and_die_by_name(
    worker_engine: Any, tiny_model_dir: Path, trie_path: Path, tmp_path: Path
) -> None:
    """Two worker processes in lockstep; their shards' checksums add up to that of the whole weights; one is killed.

    Nothing is left in /dev/shm.
    """
    prompts, files = ragged_prompts(12), [str(tmp_path / name) for name in ("prompts.json", "groups.json")]
    Path(files[0]).write_text(json.dumps(prompts))
    script = Path(__file__).with_name("generate_groups.py")
    command = [sys.executable, str(script), str(tiny_model_dir), str(trie_path), "2", *files]
    before = set(Path("/dev/shm").iterdir())
    run = subprocess.run(command, cwd=script.parent.parent, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    assert not [path for path in set(Path("/dev/shm").iterdir()) - before if "cpushm" in path.name]
    answer = json.loads(Path(files[1]).read_text())
    assert answer["loaded"] == answer["sent"]
    assert answer["refused"].startswith("the weights that arrived are not those that the engine holds: missing ['")
    assert len(answer["deaths"]) == 2
    for found, expected in zip(answer["groups"], generate(worker_engine, prompts, 8), strict=True):
        assert found["item_class"] == expected.item_class.tolist()
        np.testing.assert_allclose(found["score"], expected.score, atol=1e-4)


def test_only_the_first_rank_sends_candidates_and_every_rank_checks_the_logits(
    worker_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search() -> list[Candidates]:
        prompts = [np.array(prompt, np.int32) for prompt in ragged_prompts(2)]
        return worker_of(worker_engine).search_groups(prompts, [0, 1], "beam", 4)

    assert len(search()) == 2
    monkeypatch.setattr(PagedModel, "is_first_rank", False)
    assert search() == []
    logits = PagedModel.logits
    monkeypatch.setattr(PagedModel, "logits", lambda model, hidden: logits(model, hidden) * torch.nan)
    with pytest.raises(LogitsError):
        search()


@pytest.mark.parametrize("strategy", ["beam", "sample", "stochastic_beam", "unconstrained"])
def test_a_batch_plans_with_the_blocks_that_it_may_need_and_not_with_the_whole_cache(
    worker_engine: Any, monkeypatch: pytest.MonkeyPatch, strategy: Strategy
) -> None:
    given: list[int] = []

    def planned(prompts: Any, beams: int, num_blocks: int, block_size: int) -> BeamBlocks:
        given.append(num_blocks)
        return BeamBlocks(prompts, beams, num_blocks, block_size)

    monkeypatch.setattr("rollout.vllm_worker.BeamBlocks", planned)
    for batch in (ragged_prompts(2), ragged_prompts(16)):
        generate(worker_engine, batch, 4, strategy=strategy)
    assert given[0] < given[1] < paged_model(worker_engine).num_blocks


def test_a_prompt_that_cannot_fit_names_the_key_to_raise(worker_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_model(worker_engine), "num_blocks", 20)
    with pytest.raises(EngineError, match=r"prompt of 300 tokens.*rollout.kv_cache_gib by a factor of") as error:
        generate(worker_engine, [[5] * 300], 64)
    needed = int(str(error.value).split("needs ")[1].split()[0])
    monkeypatch.setattr(paged_model(worker_engine), "num_blocks", needed)  # one of them is vLLM's own
    monkeypatch.setattr(paged_model(worker_engine), "forward", None)  # whatever comes before it does not run either
    with pytest.raises(EngineError, match=r"by a factor of 1\.1"):
        generate(worker_engine, [[5] * 20] * 40 + [[5] * 300], 64)


def test_internals_name_what_moved() -> None:
    runner = SimpleNamespace(**dict.fromkeys(name for name in RUNNER_NAMES if name != "attn_groups"))
    with pytest.raises(UnsupportedModelError, match=r"SimpleNamespace has no attn_groups.*requests"):
        PagedModel(runner)


def test_caches_that_ask_more_of_a_runner_are_refused() -> None:
    """Latent attention, attention sinks: their specifications are kinds of vLLM's FullAttentionSpec."""
    from vllm.v1 import kv_cache_interface

    shape: Any = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    full = kv_cache_interface.FullAttentionSpec(**shape)
    latent, sinks = kv_cache_interface.MLAAttentionSpec(**shape), kv_cache_interface.SinkFullAttentionSpec(**shape)

    def model_with(*specs: Any) -> PagedModel:
        groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
        values: dict[str, Any] = dict.fromkeys(RUNNER_NAMES)
        values["model_config"] = SimpleNamespace(get_vocab_size=lambda: 50)
        values["device"] = torch.device("cuda")
        values["kv_caches"] = [torch.zeros(7, 2)]
        values["kv_cache_config"] = SimpleNamespace(num_blocks=7, kv_cache_groups=groups)
        return PagedModel(SimpleNamespace(**values))

    assert model_with(full).block_size == 16
    for specs, kinds in (((latent,), "MLAAttentionSpec"), ((sinks,), "SinkFull"), ((full, full), "Full.*Full")):
        with pytest.raises(UnsupportedModelError, match=rf"groups \['{kinds}.*\].*rollout.engine=requests"):
            model_with(*specs)


@pytest.mark.parametrize("cache_dropped", [True, False])
def test_keys_and_values_of_old_weights_are_an_error(cache_dropped: bool) -> None:
    engine = WorkerEngine.__new__(WorkerEngine)
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(model_executor=None),
        collective_rpc=lambda method, args: [3, 4],
        reset_prefix_cache=lambda: cache_dropped,
    )
    engine._llm = cast(Any, llm)
    if cache_dropped:
        assert engine.load_weights([]) == 7
    else:
        with pytest.raises(EngineError, match="keys and values of the old weights"):
            engine.load_weights([])


def having(names: Sequence[str], but: str) -> SimpleNamespace:
    return SimpleNamespace(**dict.fromkeys(name for name in names if name != but))


@pytest.mark.parametrize("name", [*ENGINE_NAMES, *WORKER_NAMES, *LOADING_NAMES])
def test_what_both_engines_need_is_named_where_it_moved(name: str, trie_path: Path) -> None:
    """A name of the worker's that its model runner shares is missing in either."""
    worker = having(WORKER_NAMES, name)
    if "model_runner" in vars(worker):
        worker.model_runner = having(LOADING_NAMES, name)
    llm = SimpleNamespace(
        llm_engine=having(ENGINE_NAMES, name),
        collective_rpc=lambda method, args: [getattr(WeightsWorker, method)(worker, *args)],
    )
    with pytest.raises(UnsupportedModelError, match=rf"SimpleNamespace has no {name};.*install the vLLM"):
        BaseEngine.__init__(SimpleNamespace(), llm, trie_path, RolloutConfig())
