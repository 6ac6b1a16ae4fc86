"""The opponent of the benchmarks computes what the published code computed."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks.published_way import Completions, PublishedTrainer, StepReport, advantages
from catalog.trie import Trie


@pytest.fixture(scope="module")
def golden_trie(golden_dir: Path) -> Trie:
    """Titles tokenised after the response marker, as the golden set was made."""
    tokenizer = AutoTokenizer.from_pretrained(golden_dir / "model")
    titles = pq.read_table(golden_dir / "items.parquet")["title"].to_pylist()
    marker = tokenizer("### Response:\n").input_ids
    full = tokenizer([f'### Response:\n"{title}"\n' for title in titles]).input_ids
    assert all(tokens[: len(marker)] == marker for tokens in full)
    eos = tokenizer.eos_token_id
    return Trie.from_titles(
        [[*tokens[len(marker) :], eos] for tokens in full], eos_token=eos, tokenizer_fingerprint="golden"
    )


@pytest.fixture(scope="module")
def trainer(golden_dir: Path, golden_trie: Trie) -> PublishedTrainer:
    return PublishedTrainer(str(golden_dir / "model"), golden_trie, device="cpu")


@pytest.mark.parametrize("python_mask", [False, True])
def test_candidates_are_the_published_ones(trainer: PublishedTrainer, golden_dir: Path, python_mask: bool) -> None:
    prompts = json.loads((golden_dir / "beams.json").read_text())["train"]
    trainer.python_mask = python_mask
    chosen = [prompt for prompt in prompts if prompt["batch"] == int(python_mask)]
    completions = trainer.generate([prompt["prompt_token_ids"] for prompt in chosen])
    assert completions.tokens() == [sequence["token_ids"] for prompt in chosen for sequence in prompt["sequences"]]


@pytest.mark.parametrize(
    ("batch", "beta", "gradient_checkpointing"), [(0, 1e-3, False), (0, 1e-3, True), (1, 0.0, False)]
)
def test_loss_and_gradients_are_the_published_ones(
    golden_dir: Path, golden_trie: Trie, batch: int, beta: float, gradient_checkpointing: bool
) -> None:
    golden = json.loads((golden_dir / "loss.json").read_text())
    expected = next(
        result
        for result in golden["results"]
        if (result["batch"], result["loss_type"], result["beta"]) == (batch, "grpo", beta)
    )
    trainer = PublishedTrainer(
        str(golden_dir / "model"),
        golden_trie,
        beta=beta,
        gradient_checkpointing=gradient_checkpointing,
        device="cpu",
    )
    trainer.policy.load_state_dict(load_file(golden_dir / "loss_policy.safetensors"), strict=False)
    tensors = load_file(golden_dir / golden["batches"][batch]["file"])
    completions = Completions(
        torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], 1),
        torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], 1),
        tensors["prompt_ids"].shape[1],
    )
    loss = trainer.accumulate(completions, tensors["advantages"].view(-1, 16), 1, StepReport())
    assert loss == pytest.approx(expected["loss"], rel=1e-5, abs=1e-7)
    for name, parameter in trainer.policy.named_parameters():
        assert parameter.grad.double().norm().item() == pytest.approx(expected["grads"][name][1], rel=1e-5), name
    assert trainer.update() == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_rewards_and_advantages_are_the_published_ones(trainer: PublishedTrainer, golden_dir: Path) -> None:
    golden = json.loads((golden_dir / "loss.json").read_text())
    examples = pq.read_table(golden_dir / "examples.parquet").to_pylist()
    target_of = {example["example_id"]: example["target_item_id"] for example in examples}
    for batch in golden["batches"]:
        tensors = load_file(golden_dir / batch["file"])
        completions = Completions(tensors["completion_ids"], tensors["completion_mask"], 0)
        targets = [target_of[example_id] for example_id in batch["example_ids"]]
        rewards = trainer.rewards(completions.tokens(), targets)
        torch.testing.assert_close(rewards.flatten(), tensors["sliced_rewards"])
        torch.testing.assert_close(advantages(rewards).flatten(), tensors["advantages"], rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_float32_master_weights(golden_dir: Path, golden_trie: Trie) -> None:
    prompts = json.loads((golden_dir / "beams.json").read_text())["train"][:1]
    trainer = PublishedTrainer(
        str(golden_dir / "model"), golden_trie, dtype="bfloat16", group_size=4, learning_rate=1e-6, device="cpu"
    )
    before = [weight.clone() for weight in trainer.master]
    for _ in range(2):
        trainer.step(
            [prompt["prompt_token_ids"] for prompt in prompts], [prompt["target_item_id"] for prompt in prompts]
        )
    assert any((weight != old).any() for weight, old in zip(trainer.master, before, strict=True))
    for weight, master in zip(trainer.weights, trainer.master, strict=True):
        torch.testing.assert_close(weight.float(), master.to(torch.bfloat16).float(), rtol=0, atol=0)
