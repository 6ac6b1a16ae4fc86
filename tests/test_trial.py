"""What is tried before SFT, with actors that only take notes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from catalog.catalog import Catalog
from launch import progress, run, trial
from launch.compose import compose
from launch.config import ConfigError
from rollout.actor import ChecksumMismatch
from rollout.vllm_internals import UnsupportedModelError
from rollout.vllm_layout import HeldWeights

Asked = list[tuple[str, list[int]]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """(split, examples) of each evaluation, and of the rollout for training."""
    notes: Asked = []
    monkeypatch.setattr(trial, "evaluate", lambda fleet, config, split, ids: notes.append((split, ids.tolist())))
    return notes


def actors_of(catalog: Catalog, asked: Asked, checked: list[object], workers: int) -> Any:
    def launch(split: str, ids: np.ndarray, seed: int) -> str:
        asked.append((split, ids.tolist()))
        return "flight"

    return SimpleNamespace(
        rollouts=SimpleNamespace(
            catalog=catalog,
            workers=[None] * workers,
            launch=launch,
            land=lambda flight: [(0, "table")],
            sleep=lambda: None,
        ),
        rewards=SimpleNamespace(
            submit=lambda table, split: f"{table} of {split}",
            results=lambda handles: [f"scored {handle}" for handle in handles],
            metrics=lambda groups: {},
        ),
        learner=SimpleNamespace(check_rollouts=checked.extend),
    )


@pytest.mark.parametrize("eval_every", [0, 5])
def test_the_longest_prompts_of_all_that_a_run_rolls_out_are_tried(
    small_catalog: Catalog, asked: Asked, eval_every: int
) -> None:
    checked: list[object] = []
    trial.try_groups(
        actors_of(small_catalog, asked, checked, workers=2),
        compose(overrides=[f"train.eval_every={eval_every}", "train.eval_examples=0"]),
    )
    assert [split for split, _ in asked] == (["test", "valid", "train"] if eval_every else ["test", "train"])
    for split, ids in asked:
        lengths = small_catalog.examples(split).prompt_lengths
        assert len(ids) == (2 if split == "train" else 1)
        assert sorted(lengths[ids]) == sorted(lengths)[-len(ids) :]
    assert checked == ["scored table of train"]


def test_a_model_that_vllm_holds_otherwise_is_refused(tiny_model_dir: Path) -> None:
    def mismatch() -> None:
        raise ChecksumMismatch(0, -1, 1, 2)

    rollouts = SimpleNamespace(publish=lambda export, version: None, loaded=mismatch)
    actors: Any = SimpleNamespace(rollouts=rollouts, learner=SimpleNamespace(export=None))
    with pytest.raises(
        ConfigError, match=r"vLLM stores the weights of .*ForCausalLM in another form than Hugging Face"
    ):
        trial.try_weights(actors, tiny_model_dir)


def test_what_ranks_hold_of_a_matrix_that_a_file_fuses_is_not_guessed() -> None:
    """GPT-2's queries, keys and values are one matrix in its file, and two ranks hold parts of all three."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    layer = QKVParallelLinear.__new__(QKVParallelLinear)
    nn.Module.__init__(layer)
    layer.tp_size, layer.tp_rank, layer.output_sizes, layer.num_kv_head_replicas = 2, 0, [64, 64, 64], 1
    layer.output_partition_sizes = [32, 32, 32]
    held = HeldWeights(nn.Module(), by_place=True)
    with pytest.raises(UnsupportedModelError, match=r"set rollout\.tensor_parallel=1"):
        held.note("transformer.h.0.attn.c_attn", layer, "weight", torch.zeros(96, 64))


def test_a_run_that_starts_says_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    monkeypatch.setattr(run, "trial", lambda *_: print("trial"))
    actors: Any = SimpleNamespace(
        rewards=SimpleNamespace(ready=lambda _: print("rewards are ready")),
        learner=SimpleNamespace(join=lambda: None),
        rollouts=SimpleNamespace(ready=lambda _: print("workers are ready")),
    )
    run.start(actors, compose(), tmp_path, progress.Progress())
    said = [" ".join(line.split()[:4]).partition(" [")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [
        "start waiting for rewards",
        "rewards are ready",
        "start waiting for learner",
        "start waiting for rollout",
        "workers are ready",
        "start trying weights, the",
        "trial",
        "start all actors are",
        "start all actors are",
    ]
