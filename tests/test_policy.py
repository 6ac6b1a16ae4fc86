"""Log-probabilities and gradients of packed trees against Hugging Face on padded batches."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from catalog.trie import Trie
from learner.logprobs import LogprobHead
from learner.packing import Choices, padded_batch
from learner.policy import Policy
from learner.products import widened
from learner.trie_logprobs import trie_logprobs

VOCABULARY, EOS = 97, 96
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen2-tied-sliding": lambda: Qwen2Config(
        **SHAPE, tie_word_embeddings=True, use_sliding_window=True, sliding_window=11, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral-sliding": lambda: MistralConfig(**SHAPE, sliding_window=9),
    "gemma2-sliding-softcap": lambda: Gemma2Config(
        **SHAPE,
        sliding_window=9,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
        query_pre_attn_scalar=32,
    ),
    "granite-scaled-logits": lambda: GraniteConfig(**SHAPE, logits_scaling=4.0, attention_multiplier=0.2),
    "qwen2-moe-window-in-the-mask": lambda: Qwen2MoeConfig(
        **SHAPE,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "cohere2-scaled-logits": lambda: Cohere2Config(**SHAPE, logit_scale=0.3, sliding_window=9),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are too small to gain from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def language_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()


def groups(seed: int = 0) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Three groups of one template; candidates share prefixes, repeat, and extend each other."""
    random = np.random.default_rng(seed)
    template = random.integers(0, 90, 70)
    prompts = [np.concatenate([template, random.integers(0, 90, size)]) for size in (5, 90, 3)]
    candidates = []
    for size in (6, 5, 1):
        titles = random.integers(0, 90, (3, 12))
        parts = [titles[random.integers(3)][: random.integers(1, 12)] for _ in range(size)]
        candidates.append([np.append(part, EOS) for part in parts])
    candidates[0][3] = candidates[0][2]
    candidates[0][4] = candidates[0][2][:-1]
    return prompts, candidates


def hugging_face(lm: PreTrainedModel) -> torch.Tensor:
    """[C, T]: log-softmax of the model's own logits, every candidate on its own."""
    lm.set_attn_implementation("eager")
    batch = padded_batch(*groups())
    logits = lm(input_ids=batch.tokens, attention_mask=batch.attention_mask).logits
    logp = logits.float().log_softmax(-1).flatten(0, 1)[batch.rows[batch.edge_row], batch.edge_target]
    return logp[batch.edge] * batch.mask


def gradient(lm: PreTrainedModel, logp: torch.Tensor) -> torch.Tensor:
    lm.zero_grad()
    weights = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))
    (logp * weights).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in lm.parameters()])


def logit_mib(rows: int) -> float:
    """Memory of so many float32 rows of logits."""
    return rows * VOCABULARY * 4 / 2**20


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("packing", ["tree", "padded"])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_logprobs_and_gradients_equal_hugging_face(name: str, packing: str, chunk: int) -> None:
    lm = language_model(name)
    expected = hugging_face(lm)
    expected_gradient = gradient(lm, expected)
    policy = Policy(lm, packing=packing, logit_mib=logit_mib(chunk))  # type: ignore[arg-type]
    logp = policy(policy.pack(*groups()))
    torch.testing.assert_close(logp, expected, atol=2e-5, rtol=1e-5)
    assert relative_error(gradient(lm, logp), expected_gradient) < 1e-5


def test_packing_feeds_a_fraction_of_the_padded_tokens() -> None:
    lm = language_model("llama")
    fed = [Policy(lm, packing=packing).pack(*groups()).tokens.numel() for packing in ("tree", "padded")]  # type: ignore[arg-type]
    assert fed[0] * 5 < fed[1]


@pytest.mark.parametrize("name", ["llama", "gemma2-sliding-softcap"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    lm = language_model(name).train()
    policy = Policy(lm)
    expected = gradient(lm, policy(policy.pack(*groups())))
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradient(lm, policy(policy.pack(*groups()))), expected)


def test_bfloat16_stays_close_to_float32() -> None:
    lm = language_model("qwen2")
    policy = Policy(lm)
    expected = policy(policy.pack(*groups()))
    lm.bfloat16()
    found = policy(policy.pack(*groups()))
    assert found.dtype == torch.float32
    assert (found - expected).abs().max().item() < 0.3


@pytest.mark.parametrize("packing", ["tree", "padded"])
@pytest.mark.parametrize("name", ["llama", "gemma2-sliding-softcap", "granite-scaled-logits"])
def test_trie_logprobs_are_renormalised_over_the_allowed_tokens(name: str, packing: str) -> None:
    prompts, candidates = groups()
    titles = sorted({tuple(candidate.tolist()) for group in candidates for candidate in group if candidate[-1] == EOS})
    candidates[0][4] = np.asarray(titles[0])
    trie = Trie.from_titles(titles, eos_token=EOS, tokenizer_fingerprint="test")
    lm = language_model(name)
    lm.set_attn_implementation("eager")
    batch = padded_batch(prompts, candidates)
    logits = lm(input_ids=batch.tokens, attention_mask=batch.attention_mask).logits.flatten(0, 1)[batch.rows]
    allowed = torch.full_like(logits, -torch.inf)
    flat = [candidate.tolist() for group in candidates for candidate in group]
    row = 0
    for candidate in flat:
        for step in range(len(candidate)):
            following = {title[step] for title in titles if list(title[:step]) == candidate[:step]}
            allowed[row, list(following)] = logits[row, list(following)]
            row += 1
    expected = (allowed.log_softmax(-1)[batch.edge_row, batch.edge_target])[batch.edge] * batch.mask
    expected_gradient = gradient(lm, expected)
    for chunk in (1, 1024):
        policy = Policy(lm, packing=packing, logit_mib=logit_mib(chunk), trie=trie)  # type: ignore[arg-type]
        logp = policy(policy.pack(prompts, candidates))
        torch.testing.assert_close(logp, expected, atol=2e-5, rtol=1e-5)
        assert relative_error(gradient(lm, logp), expected_gradient) < 1e-5


def test_gradients_in_trie_space_are_the_same_each_time() -> None:
    torch.set_num_threads(2)  # threads that add up in turns would race
    random = np.random.default_rng(0)
    titles = np.unique(random.integers(1, 9, (400, 6)), axis=0)
    closed = [[*title, EOS] for title in titles.tolist()]
    trie = Trie.from_titles(closed, eos_token=EOS, tokenizer_fingerprint="test")
    policy = Policy(language_model("qwen2-tied-sliding"), trie=trie)
    prompts = random.integers(0, 90, (8, 20))
    batch = policy.pack(prompts, [[closed[i] for i in random.choice(len(closed), 16, replace=False)] for _ in prompts])
    weights = torch.linspace(-1, 1, len(batch.mask))[:, None]

    def embedding_gradient() -> torch.Tensor:
        policy.lm.zero_grad()
        (policy(batch) * weights).sum().backward()
        return policy.lm.get_input_embeddings().weight.grad.clone()

    try:
        first = embedding_gradient()
        assert all(torch.equal(embedding_gradient(), first) for _ in range(10))
    finally:
        torch.set_num_threads(1)


def test_a_candidate_outside_the_trie_is_refused_with_the_place() -> None:
    trie = Trie.from_titles([[1, 2, EOS], [1, 3, EOS]], eos_token=EOS, tokenizer_fingerprint="test")
    policy = Policy(language_model("llama"), trie=trie)
    with pytest.raises(ValueError, match="candidate 1 of the batch leaves the title trie at token 1"):
        policy(policy.pack([[5, 6]], [[[1, 2, EOS], [1, 4, EOS]]]))


@pytest.mark.parametrize("wrong", [[1, 8], [1, 3, 3], [7]])
def test_tokens_of_no_title_and_tokens_after_the_end_are_outside_the_trie_too(wrong: list[int]) -> None:
    trie = Trie.from_titles([[1, 2, 3], [1, 3], [4, 3]], eos_token=3, tokenizer_fingerprint="test")
    policy = Policy(language_model("llama"), trie=trie)
    with pytest.raises(ValueError, match=f"candidate 1 of the batch leaves the title trie at token {len(wrong) - 1}"):
        policy(policy.pack([[5, 6]], [[[1, 2, 3], wrong]]))


def test_logits_never_exceed_the_budget_in_either_pass() -> None:
    lm = language_model("qwen2")
    policy = Policy(lm, logit_mib=logit_mib(16))
    seen: list[int] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() == 2 and result.shape[-1] == VOCABULARY:
                seen.append(result.shape[0])
            return result

    with Watch():
        logp = policy(policy.pack(*groups()))
    forward = len(seen)
    with Watch():
        gradient(lm, logp)
    assert forward > 0
    assert max(seen) <= 16
    gc.collect()
    held = [
        value
        for value in gc.get_objects()
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[-1] == VOCABULARY
    ]
    assert not held


def test_a_model_that_does_more_to_its_logits_is_refused() -> None:
    """vLLM would roll out another distribution than the one that is trained."""
    lm = language_model("llama")
    lm.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output * 0.5)
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM computes logits that differ"):
        Policy(lm)


def test_the_budget_of_logits_counts_those_of_the_device_that_computes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is made on the CPU, which may have to widen bfloat16, and moves to the learner's device later."""
    monkeypatch.setattr("learner.products.has_bfloat16", lambda: False)
    projection = nn.Linear(8, 128, bias=False, dtype=torch.bfloat16)
    head = LogprobHead(projection, LlamaConfig(), chunk_mib=1)
    there = projection.to("meta").weight
    assert head.chunk_rows(widened(there)) * 128 * 2 == 2**20


@pytest.mark.parametrize("chunk", [3, 1024])
def test_a_projection_may_have_a_bias(chunk: int) -> None:
    """As Phi's has."""
    projection, hidden = nn.Linear(8, VOCABULARY), torch.randn(10, 8, requires_grad=True)
    head = LogprobHead(projection, LlamaConfig(), logit_mib(chunk))
    row, target = torch.arange(10), torch.arange(10) * 9
    everything = Choices(
        row.repeat_interleave(VOCABULARY),
        torch.arange(VOCABULARY).repeat(10),
        row.repeat_interleave(VOCABULARY),
        row * VOCABULARY + target,
        row[:, None],
    )
    expected = projection(hidden).log_softmax(-1)[row, target]
    inputs = (hidden, *projection.parameters())
    expected_gradients = torch.autograd.grad(expected @ torch.linspace(-1, 1, 10), inputs, retain_graph=True)
    for found in (head(hidden, row, target, np.arange(11)), trie_logprobs(head, hidden, everything)[:, 0]):
        torch.testing.assert_close(found, expected)
        gradients = torch.autograd.grad(found @ torch.linspace(-1, 1, 10), inputs)
        torch.testing.assert_close(gradients, expected_gradients)


def test_tokens_of_padded_groups_are_counted_with_their_padding() -> None:
    prompts, candidates = groups()
    tree, padded = (Policy(language_model("llama"), packing=packing) for packing in ("tree", "padded"))
    assert sum(tree.group_tokens(prompts, candidates)) >= tree.pack(prompts, candidates).fed_tokens
    together = padded.pack(prompts, candidates)
    assert (
        sum(padded.group_tokens(prompts, candidates))
        >= together.tokens.numel()
        > tree.pack(prompts, candidates).fed_tokens
    )


def test_the_saved_model_does_not_remember_the_packing(tmp_path: Path) -> None:
    lm = language_model("llama")
    Policy(lm)
    lm.save_pretrained(tmp_path)
    assert "tree" not in (tmp_path / "config.json").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen2", "gemma2-sliding-softcap", "mistral-sliding"])
def test_flex_attention_on_cuda_equals_the_padded_path(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    lm = language_model(name).cuda()
    expected = gradient(lm, (padded := Policy(lm, packing="padded"))(padded.pack(*groups())).cpu())
    policy = Policy(lm)
    found = gradient(lm, policy(policy.pack(*groups())).cpu())
    assert relative_error(found, expected) < 1e-3
