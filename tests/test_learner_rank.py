"""The learner's step: the same under every ZeRO stage and number of ranks, and the same as plain PyTorch."""

from dataclasses import replace

import learner_gang
import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_gang import assert_same_training
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, LlamaForCausalLM, OPTConfig, PhimoeConfig

from learner.advantages import group_advantages
from learner.config import LearnerConfig, LoraConfig, OptimizerConfig
from learner.experience import Experience
from learner.learner import without_dropout
from learner.lora import add_adapters
from learner.objectives.base import LEARNERS_METRICS
from learner.schedule import learning_rate
from rollout.groups import INCLUSION_WEIGHT

gangs, learner_data = learner_gang.gangs, learner_gang.learner_data
STEPS = 3
CONFIG = LearnerConfig(
    beta=0.05,
    micro_batch_tokens=600,
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.0, weight_decay=0.01),
)


@pytest.fixture(scope="module")
def steps(learner_data):
    return [learner_data.tables(step) for step in range(STEPS)]


@pytest.fixture(scope="module")
def expected(gangs, steps):
    """Stage 0 on one rank."""
    return gangs[1]("train", CONFIG, steps)


def plain_grpo(data, steps, config):
    """Losses and gradient norms of all updates, and the weights after them, one sequence at a time."""
    torch.set_num_threads(1)
    model, reference = (AutoModelForCausalLM.from_pretrained(data.model_path) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.optimizer.weight_decay)

    def logprobs(lm, groups, rows):
        for row in rows:
            for title in groups.candidates[row]:
                ids = torch.tensor([[*groups.prompts[row], *title]])
                of_all = lm(ids).logits[0, -len(title) - 1 : -1].log_softmax(-1)
                yield of_all.gather(1, ids[0, -len(title) :, None])[:, 0]

    updates = []
    low, high = (1 - (config.clip_low or 1.0), 1 + (config.clip_high or 1e9))
    for tables in steps:
        groups = Experience.from_tables(tables)
        advantages = group_advantages(groups.rewards)
        parts = np.array_split(np.arange(len(groups)), config.mini_batches)
        with torch.no_grad():
            before = [list(logprobs(model, groups, part)) for part in parts]
            refs = [list(logprobs(reference, groups, part)) for part in parts]
        for _ in range(config.updates_per_batch):
            for part, olds, of_reference in zip(parts, before, refs, strict=True):
                weights, losses = np.concatenate([advantages[row] for row in part]).tolist(), []
                for logp, old, ref, weight in zip(
                    logprobs(model, groups, part), olds, of_reference, weights, strict=True
                ):
                    ratio, kl = torch.exp(logp - old), torch.exp(ref - logp) - (ref - logp) - 1
                    gain = torch.minimum(ratio * weight, ratio.clamp(low, high) * weight)
                    losses.append((config.beta * kl - gain).mean())
                optimizer.zero_grad()
                loss = torch.stack(losses).mean()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config.optimizer, len(updates), len(steps) * config.updates_per_step)
                optimizer.step()
                updates.append((loss.item(), norm.item()))
    return updates, {name: weight.detach().numpy() for name, weight in model.named_parameters()}


SEVERAL_UPDATES = {"clip_low": 0.02, "clip_high": 0.03}


@pytest.mark.parametrize(
    ("ranks", "changed"),
    [
        (1, {}),
        (1, SEVERAL_UPDATES | {"updates_per_batch": 2}),
        (1, SEVERAL_UPDATES | {"mini_batches": 3}),
        (2, SEVERAL_UPDATES | {"mini_batches": 2, "updates_per_batch": 2, "zero_stage": 3}),
    ],
    ids=str,
)
def test_a_step_equals_plain_pytorch(gangs, learner_data, steps, expected, ranks, changed):
    config = replace(CONFIG, **changed)
    found = gangs[ranks]("train", config, steps) if changed else expected
    updates, weights = plain_grpo(learner_data, steps, config)
    assert_same_training(found["weights"], weights, learner_data)
    each = config.updates_per_step
    for step, metrics in enumerate(found["metrics"]):
        loss, norm = np.mean(updates[step * each : (step + 1) * each], axis=0)
        assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert metrics["lr"] == learning_rate(CONFIG.optimizer, step * each, STEPS * each)
        assert metrics["completion_tokens"] == expected["metrics"][step]["completion_tokens"]
        assert (metrics["clipped"] > 0) == bool(changed)
    assert found["metrics"][0]["mismatch"] == pytest.approx(expected["metrics"][0]["mismatch"], rel=1e-4)


def test_what_the_learner_measures_has_names_that_no_objective_may_take(expected):
    of_grpo, times = {"kl", "clipped"}, {name for name in expected["metrics"][0] if name.startswith("seconds/")}
    assert times
    assert expected["metrics"][0].keys() - times - of_grpo == LEARNERS_METRICS - {"candidates"}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_and_number_of_ranks_gives_the_same_weights(gangs, learner_data, steps, expected, stage, ranks):
    found = gangs[ranks]("train", replace(CONFIG, zero_stage=stage), steps)
    assert_same_training(found["weights"], expected["weights"], learner_data)
    for mine, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        for name in ("loss", "kl", "grad_norm", "completion_tokens"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert found["sent"] == found["checksum"]


SMALL_STEPS = OptimizerConfig(learning_rate=2e-5, warmup_ratio=0.0, schedule="constant")
IN_BFLOAT16 = replace(CONFIG, dtype="bfloat16", zero_stage=1, optimizer=SMALL_STEPS)


@pytest.fixture(scope="module")
def in_bfloat16(gangs, steps):
    """Weights after one update and after twelve, of one rank under ZeRO-1."""
    return [gangs[1]("train", IN_BFLOAT16, [steps[0]] * updates)["weights"] for updates in (1, 12)]


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (0, 2), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)])
def test_bfloat16_keeps_float32_master_weights(gangs, steps, in_bfloat16, stage, ranks):
    """Updates far below bfloat16's resolution add up, so a stage without master weights would not move."""
    start, expected = in_bfloat16
    found = gangs[ranks]("train", replace(IN_BFLOAT16, zero_stage=stage), [steps[0]] * 12)["weights"]
    moved = sum(np.abs(found[name] - start[name]).sum() for name in start)
    agree = sum(np.abs(found[name] - expected[name]).sum() for name in start)
    assert moved > 0
    assert agree < 0.25 * moved


def test_tree_and_padded_packing_make_the_same_step(gangs, learner_data, steps, expected):
    padded = gangs[1]("train", replace(CONFIG, packing="padded"), steps)
    assert_same_training(padded["weights"], expected["weights"], learner_data)
    assert padded["metrics"][0]["packed_tokens"] > 2 * expected["metrics"][0]["packed_tokens"]


def test_micro_batches_change_nothing(gangs, learner_data, steps, expected):
    whole = gangs[1]("train", replace(CONFIG, micro_batch_tokens=10**6), steps)
    assert whole["metrics"][0]["micro_batches"] == 1 < expected["metrics"][0]["micro_batches"]
    assert_same_training(whole["weights"], expected["weights"], learner_data)


def test_gradient_checkpointing_changes_nothing(gangs, learner_data, steps, expected):
    found = gangs[1]("train", replace(CONFIG, gradient_checkpointing=True), steps)
    assert_same_training(found["weights"], expected["weights"], learner_data)


def test_groups_without_information_cost_nothing_when_beta_is_0(gangs, learner_data):
    found = gangs[1]("train", replace(CONFIG, beta=0.0), [learner_data.tables(0)])["metrics"][0]
    everything = gangs[1]("train", CONFIG, [learner_data.tables(0)])["metrics"][0]
    assert found["frac_uninformative"] == pytest.approx(1 / 3)
    assert found["completion_tokens"] < 0.8 * everything["completion_tokens"]
    assert found["groups"] == everything["groups"] == 6


def test_a_step_without_any_information_leaves_the_weights(gangs, learner_data):
    flat = [learner_data.tables(0)[0].slice(0, 1)]  # its rewards are all equal
    config = replace(CONFIG, beta=0.0, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.0))
    found = gangs[2]("train", config, [flat])
    initial = AutoModelForCausalLM.from_pretrained(learner_data.model_path)
    assert found["metrics"][0]["grad_norm"] == 0.0
    assert all(np.array_equal(found["weights"][n], p.detach().numpy()) for n, p in initial.named_parameters())


def test_the_reference_follows_the_policy(gangs, steps, learner_data):
    found = gangs[1]("train", replace(CONFIG, reference_sync_every=3, reference_sync_alpha=0.6), steps)
    initial = AutoModelForCausalLM.from_pretrained(learner_data.model_path).state_dict()
    blended = {name: 0.6 * w + 0.4 * initial[name].numpy() for name, w in found["weights"].items()}
    for name, weight in blended.items():
        np.testing.assert_allclose(found["reference"][name], weight, atol=1e-6, err_msg=name)


def test_later_updates_of_a_batch_are_clipped_against_the_first(gangs, steps):
    clipped = replace(CONFIG, updates_per_batch=4, clip_low=1e-4, clip_high=1e-4)
    free = replace(CONFIG, updates_per_batch=4)
    found, unclipped = (gangs[1]("train", config, steps[:1]) for config in (clipped, free))
    assert any(not np.allclose(found["weights"][n], unclipped["weights"][n], atol=1e-6) for n in found["weights"])
    assert found["metrics"][0]["clipped"] > 0
    assert unclipped["metrics"][0]["clipped"] < found["metrics"][0]["clipped"]


def with_inclusion_weights(tables, weights):
    """The tables with the same weights in every group."""
    return [
        table.append_column(INCLUSION_WEIGHT, pa.array([weights] * len(table), pa.list_(pa.float32())))
        for table in tables
    ]


def test_inclusion_weights_scale_the_candidates(gangs, learner_data, steps, expected):
    weighted = replace(CONFIG, inclusion_weights=True)
    alike = gangs[1]("train", weighted, [with_inclusion_weights(step, [0.25] * 4) for step in steps])
    assert_same_training(alike["weights"], expected["weights"], learner_data)

    only_first = gangs[1]("train", weighted, [with_inclusion_weights(steps[1], [0.5, 0.0, 0.0, 0.0])])
    plain = gangs[1]("train", CONFIG, [steps[1]])
    assert only_first["metrics"][0]["loss"] != pytest.approx(plain["metrics"][0]["loss"], abs=1e-3)


def test_inclusion_weights_that_are_not_there_are_an_error(gangs, steps):
    with pytest.raises(Exception, match=r"no column 'inclusion_weight'.*rollout\.strategy=stochastic_beam"):
        gangs[1]("train", replace(CONFIG, inclusion_weights=True), steps[:1])


def test_adapters_are_merged_on_export(gangs, steps, learner_data, tmp_path):
    config = replace(CONFIG, lora=LoraConfig(rank=4), optimizer=OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0))
    own = gangs[1]("export_to", config, steps, str(tmp_path))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    initial = AutoModelForCausalLM.from_pretrained(learner_data.model_path)
    assert merged.state_dict().keys() == initial.state_dict().keys()
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, initial.get_parameter(n))}
    assert changed
    assert all(name.endswith("_proj.weight") for name in changed)
    prompt = learner_data.catalog.examples("train").prompt_tokens(0).tolist()
    title = learner_data.catalog.trie.title_tokens(0)
    logits = merged(torch.tensor([[*prompt, *title]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert own == pytest.approx(logits.gather(1, torch.tensor(title)[:, None])[:, 0].tolist(), abs=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_train_alike_under_zero(gangs, learner_data, steps, expected, stage):
    config = replace(CONFIG, lora=LoraConfig(rank=4))
    found = gangs[2]("train", replace(config, zero_stage=stage), steps)
    alone = gangs[1]("train", config, steps)
    assert found["sent"] == found["checksum"]
    assert_same_training(found["weights"], alone["weights"], learner_data)
    assert any(np.abs(alone["weights"][n] - expected["weights"][n]).max() > 1e-6 for n in expected["weights"])


@pytest.mark.parametrize(
    ("ranks", "change"),
    [
        (1, {"zero_stage": 0}),
        (1, {"zero_stage": 0, "gradient_checkpointing": True}),
        (2, {"zero_stage": 0, "packing": "padded"}),
        (2, {"zero_stage": 1, "updates_per_batch": 2}),
        (2, {"zero_stage": 2, "offload_optimizer": True}),
    ],
    ids=str,
)
def test_a_reference_of_adapters_makes_the_steps_of_a_second_model(gangs, learner_data, steps, ranks, change):
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0)
    shared = replace(CONFIG, lora=LoraConfig(rank=4), optimizer=optimizer, reference_sync_every=2, **change)
    found = gangs[ranks]("train", replace(shared, reference_sync_alpha=1.0), steps)
    second = gangs[ranks]("train", replace(shared, reference_sync_alpha=1 - 1e-9), steps)  # all but the same
    assert all(".lora_" in name for name in found["reference"])
    assert second["reference"].keys() == second["weights"].keys()
    for mine, theirs in zip(found["metrics"], second["metrics"], strict=True):
        for name in ("loss", "kl", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert found["metrics"][1]["kl"] > 1e-3
    assert_same_training(found["weights"], second["weights"], learner_data)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_makes_the_same_steps(gangs, learner_data, steps, expected, stage):
    found = gangs[2]("train", replace(CONFIG, zero_stage=stage, offload_optimizer=True), steps)
    assert_same_training(found["weights"], expected["weights"], learner_data)


TINY_LLAMA = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    attention_dropout=0.5,
)


def test_an_adapter_on_the_output_head_is_refused():
    lm = LlamaForCausalLM(TINY_LLAMA)
    with pytest.raises(ValueError, match="lm_head is the output head"):
        add_adapters(lm, LoraConfig(rank=2, target_modules=["q_proj", "lm_head"]))


def test_an_adapter_on_what_the_model_has_not_is_refused():
    message = r"no module of the model is called 'qproj'; its linear layers are .*q_proj"
    with pytest.raises(ValueError, match=message):
        add_adapters(LlamaForCausalLM(TINY_LLAMA), LoraConfig(rank=2, target_modules=["q_proj", "qproj"]))


def test_an_adapter_on_what_the_output_head_is_tied_to_is_refused():
    adapters = LoraConfig(rank=2, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match=r"the output head is tied to model\.embed_tokens"):
        add_adapters(LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA.to_dict(), "tie_word_embeddings": True})), adapters)
    untied = LlamaForCausalLM(TINY_LLAMA)
    add_adapters(untied, adapters)
    assert hasattr(untied.model.embed_tokens, "lora_embedding_A")


def test_dropout_is_off_wherever_an_architecture_keeps_it():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    for config in (
        OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=16, dropout=0.5, layerdrop=0.5),
        FalconConfig(**sizes, hidden_dropout=0.5, attention_dropout=0.5),
        PhimoeConfig(**sizes, intermediate_size=32, num_key_value_heads=2, num_local_experts=2),
    ):
        without_dropout(AutoModelForCausalLM.from_config(config))  # raises for a model that stays random


def test_a_model_that_stays_random_is_refused(monkeypatch):
    lm = LlamaForCausalLM(TINY_LLAMA)
    monkeypatch.setattr(lm.lm_head, "forward", lambda hidden: torch.randn(*hidden.shape[:2], TINY_LLAMA.vocab_size))
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM computes other logits each time"):
        without_dropout(lm)


def test_only_adapters_keep_their_dropout():
    lm = LlamaForCausalLM(TINY_LLAMA)
    without_dropout(lm)
    add_adapters(lm, LoraConfig(rank=2, dropout=0.25))
    assert {module.p for module in lm.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}
    assert lm.model.layers[0].self_attn.attention_dropout == 0.0
