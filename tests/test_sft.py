"""SFT: what shares a history is packed together, the loss falls, and the best weights stay."""

from dataclasses import replace

import learner_gang
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.config import LearnerConfig, LoraConfig, OptimizerConfig, SftConfig
from learner.packing import pack_groups, padded_batch
from learner.sft_data import SupervisedExamples

gangs, learner_data = learner_gang.gangs, learner_gang.learner_data
RISING = OptimizerConfig(learning_rate=3e-3, warmup_ratio=0.0)
CONFIG = LearnerConfig(
    micro_batch_tokens=1500, sft=SftConfig(epochs=2, batch_size=64, patience=2, valid_examples=0, optimizer=RISING)
)


@pytest.fixture(scope="module")
def examples(learner_data):
    return SupervisedExamples(learner_data.catalog.examples("train"), learner_data.catalog.trie)


def test_an_epoch_holds_every_example_once_and_keeps_users_together(examples):
    batches = list(examples.batches(size=32, seed=1))
    assert sorted(np.concatenate(batches)) == list(range(len(examples)))
    assert {len(batch) for batch in batches[:-1]} == {32}
    users = examples.user[np.concatenate(batches)]
    assert (np.diff(users) != 0).sum() == users.max()  # each user is one run
    assert not np.array_equal(np.concatenate(batches), np.concatenate(list(examples.batches(size=32, seed=2))))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("budget", [60, 400, 5000])
def test_a_plan_feeds_every_example_once_within_the_budget(examples, budget, ranks):
    batch = next(examples.batches(size=50, seed=0))
    plan = examples.plan(batch, budget, ranks)
    assert len({len(micros) for micros in plan}) == 1
    assert sorted(np.concatenate([rows for micros in plan for rows in micros])) == sorted(batch)
    for rows in (rows for micros in plan for rows in micros if len(rows) > 1):
        packed = pack_groups([examples.prompt(row) for row in rows], [[examples.title(row)] for row in rows])
        assert packed.fed_tokens <= budget


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("budget", [60, 400, 5000])
def test_a_plan_of_padded_batches_counts_their_padding(examples, budget, ranks):
    batch = next(examples.batches(size=50, seed=0))
    plan = examples.plan(batch, budget, ranks, "padded")
    assert sorted(np.concatenate([rows for micros in plan for rows in micros])) == sorted(batch)
    for rows in (rows for micros in plan for rows in micros if len(rows) > 1):
        padded = padded_batch([examples.prompt(row) for row in rows], [[examples.title(row)] for row in rows])
        assert padded.tokens.numel() <= budget


def test_shared_histories_are_fed_once(examples):
    batch = next(examples.batches(size=64, seed=0))
    (micros,) = examples.plan(batch, 10**6, 1)
    rows = np.concatenate(micros)
    packed = pack_groups([examples.prompt(row) for row in rows], [[examples.title(row)] for row in rows])
    alone = sum(len(examples.prompt(row)) + len(examples.title(row)) - 1 for row in rows)
    assert packed.fed_tokens < 0.6 * alone


def test_a_limit_takes_examples_of_the_whole_split(learner_data):
    everything = learner_data.catalog.examples("train")
    limited = SupervisedExamples(everything, learner_data.catalog.trie, limit=20)
    assert len(limited) == 20


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loss_falls_and_is_that_of_hugging_face(gangs, learner_data, tmp_path, ranks):
    result = gangs[ranks]("sft", CONFIG, str(tmp_path), str(tmp_path / "model"))
    epochs = [report for report in result["reports"] if "valid_loss" in report]
    assert [report["stop"] for report in epochs] == [0.0, 1.0]
    assert epochs[1]["valid_loss"] < epochs[0]["valid_loss"] < 5.9  # log of the vocabulary is 5.99
    assert result["loss_after"] == pytest.approx(epochs[1]["valid_loss"], rel=1e-5)

    model, total, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), 0.0, 0
    valid = learner_data.catalog.examples("valid")
    for row in range(len(valid)):
        title = learner_data.catalog.trie.title_tokens(int(valid.target_class[row]))
        ids = torch.tensor([[*valid.prompt_tokens(row).tolist(), *title]])
        with torch.no_grad():
            logp = model(ids).logits[0, -len(title) - 1 : -1].log_softmax(-1)
        total -= float(logp.gather(1, ids[0, -len(title) :, None]).sum())
        tokens += len(title)
    assert result["loss_after"] == pytest.approx(total / tokens, rel=1e-4)
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "progress.json", "epoch-2"}


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("generation_config.json", {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1}),
        ("generation_config.json", {"early_stopping": True, "pad_token_id": -1}),
        ("config.json", {"temperature": 0.7, "top_p": 0.8, "top_k": 20}),
    ],
    ids=str,
)
def test_sampling_defaults_that_transformers_would_not_save_are_left_out(
    gangs, learner_data, tmp_path, file, settings
):
    model = learner_gang.with_settings(learner_data.model_path, tmp_path / "given", file, settings)
    if file == "config.json":
        (model / "generation_config.json").unlink()
    given = AutoModelForCausalLM.from_pretrained(model).generation_config
    config = replace(CONFIG, sft=replace(CONFIG.sft, epochs=1))
    gangs[1]("sft", config, str(tmp_path / "sft"), str(tmp_path / "saved"), model_path=str(model))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    saved.validate(strict=True)
    assert (saved.bos_token_id, saved.eos_token_id) == (given.bos_token_id, given.eos_token_id)
    assert given.eos_token_id is not None
    assert saved.pad_token_id == (None if given.pad_token_id == -1 else given.pad_token_id)
    assert not {"temperature", "top_p", "top_k", "early_stopping"} & saved.to_diff_dict().keys()


def test_ranks_agree(gangs, tmp_path):
    losses = [gangs[ranks]("sft", CONFIG, str(tmp_path))["loss_after"] for ranks in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_it_stops_when_validation_no_longer_improves_and_keeps_the_best(gangs, tmp_path):
    steady = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0, schedule="constant")
    config = replace(CONFIG, sft=replace(CONFIG.sft, epochs=60, patience=2, optimizer=steady))  # it will overfit
    result = gangs[1]("sft", config, str(tmp_path))
    losses = [report["valid_loss"] for report in result["reports"] if "valid_loss" in report]
    best = int(np.argmin(losses))
    assert best > 0
    assert len(losses) == best + 1 + 2 < 60
    assert result["loss_after"] == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("changed", [{}, {"lora": LoraConfig(rank=2, dropout=0.2)}, {"dtype": "bfloat16"}], ids=str)
def test_broken_off_it_goes_on_behind_the_last_whole_epoch_bit_for_bit(gangs, tmp_path, ranks, changed):
    config = replace(CONFIG, sft=replace(CONFIG.sft, epochs=3), **changed)
    whole = gangs[ranks]("sft", config, str(tmp_path / "whole"))
    for epoch in (1, 2):
        gangs[ranks]("sft", config, str(tmp_path / "parts"), killed_in=epoch)
    rest = gangs[ranks]("sft", config, str(tmp_path / "parts"))
    assert {report["epoch"] for report in rest["reports"]} == {2, 3}
    assert rest["checksum"] == whole["checksum"]
    assert (rest["loss_after"], rest["reports"][-1]) == (whole["loss_after"], whole["reports"][-1])
    again = gangs[ranks]("sft", config, str(tmp_path / "parts"))
    assert (again["reports"], again["checksum"]) == ([], whole["checksum"])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_what_other_ranks_have_left_is_removed_before_anything_is_written(gangs, tmp_path, before, after):
    gangs[before]("sft", CONFIG, str(tmp_path), killed_in=2)
    assert {entry.name for entry in tmp_path.iterdir()} == {"progress.json", "epoch-1"}
    gangs[after]("sft", CONFIG, str(tmp_path), killed_in=1)
    assert not any(tmp_path.iterdir())
    result = gangs[after]("sft", CONFIG, str(tmp_path))
    assert {report["epoch"] for report in result["reports"]} == {1, 2}


def test_examples_are_in_the_order_of_their_users_and_histories(examples, learner_data):
    train, trie = learner_data.catalog.examples("train"), learner_data.catalog.trie
    rows = np.arange(len(train))
    _, users = np.unique([train.user_id(i) for i in rows.tolist()], return_inverse=True)
    assert np.array_equal(train.users(rows), users)
    ordered = np.lexsort((train.prompt_lengths, users))
    assert np.array_equal(examples.user, users[ordered])
    for row, example in enumerate(ordered.tolist()):
        assert np.array_equal(examples.prompt(row), train.prompt_tokens(example))
        assert examples.title(row).tolist() == trie.title_tokens(train.target_class[example])
    some = np.array([3, 0, 3])
    assert examples.title_tokens(some) == sum(len(examples.title(row)) for row in some.tolist())
