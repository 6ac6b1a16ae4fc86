"""What engine tests compare with: prompts, the model's own log-probabilities, Hugging Face's beam search."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)

from catalog.trie import Trie
from rollout.groups import Candidates

VOCABULARY = 250
"""Token ids below this are used; every byte-level tokenizer has them."""
SEEDS = list(range(64))
"""Of the groups, in order; a beam search has no use for them."""
NODE_LOGPROBS = dict[int, np.ndarray]
"""float32 [vocabulary] at each node of the trie."""


def ragged_prompts(count: int) -> list[list[int]]:
    """Prompts of 1 to 90 tokens, of which some start alike and two are equal."""
    draw = np.random.default_rng(0)
    common = draw.integers(1, VOCABULARY, 50).tolist()
    prompts = [draw.integers(1, VOCABULARY, draw.integers(1, 91)).tolist() for _ in range(count)]
    return [common + prompt[:40] if i % 3 == 0 else prompt for i, prompt in enumerate(prompts[:-1])] + [prompts[1]]


def generate(engine: Any, prompts: list[list[int]], size: int, **options: Any) -> list[Candidates]:
    return engine.generate(prompts, SEEDS[: len(prompts)], [0] * len(prompts), group_size=size, **options)


def worker_of(engine: Any) -> Any:
    """What computes for a worker engine, here in this process."""
    return engine._llm.llm_engine.model_executor.driver_worker.worker


def token_logprobs(model: Any, trie: Trie, prompt: list[int]) -> NODE_LOGPROBS:
    """Log-probabilities over the vocabulary at every node, by one forward pass over all titles."""
    titles = [trie.title_tokens(item_class)[:-1] for item_class in range(trie.num_classes)]
    longest = max(map(len, titles))
    ids = torch.tensor([prompt + title + [0] * (longest - len(title)) for title in titles])
    with torch.no_grad():
        logprobs = model(ids).logits[:, len(prompt) - 1 :].float().log_softmax(-1).numpy()
    at: NODE_LOGPROBS = {}
    for row, title in enumerate(titles):
        node = 0
        for depth, token in enumerate([*title, None]):
            at[node] = logprobs[row, depth]
            node = trie.step(node, token) if token is not None else 0
    return at


def nodes_of(trie: Trie, tokens: np.ndarray) -> list[int]:
    """The node at which each token is generated."""
    nodes = [0]
    for token in tokens[:-1].tolist():
        node = trie.step(nodes[-1], token)
        assert node is not None
        nodes.append(node)
    return nodes


def renormalised(trie: Trie, at: NODE_LOGPROBS) -> NODE_LOGPROBS:
    """Log-probabilities over the allowed tokens of each node."""
    found = {}
    for node, logprobs in at.items():
        children = logprobs[trie.children(node)[0]].astype(np.float64)
        found[node] = (logprobs - np.logaddexp.reduce(children)).astype(np.float32)
    return found


def check_logprobs(trie: Trie, groups: list[Candidates], node_logprobs: list[NODE_LOGPROBS]) -> None:
    """Every token's log-probability is the model's own, and scores are their sums."""
    for at, group in zip(node_logprobs, groups, strict=True):
        for tokens, logprobs, score in zip(group.tokens, group.logprobs, group.score, strict=True):
            own = [at[node][token] for node, token in zip(nodes_of(trie, tokens), tokens.tolist(), strict=True)]
            np.testing.assert_allclose(logprobs, own, atol=2e-5)
            np.testing.assert_allclose(score, sum(own), atol=2e-4)


class TrieMask(LogitsProcessor):
    """Forbids every token that does not continue a title; a finished or lost beam gets end-of-sequence."""

    def __init__(self, trie: Trie, prompt_tokens: int) -> None:
        self.trie, self.prompt_tokens = trie, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -1e6)
        for row, tokens in enumerate(input_ids[:, self.prompt_tokens :].tolist()):
            node: int | None = 0
            for token in tokens:
                node = self.trie.step(node, token) if node is not None and node >= 0 else None
            if node is not None and node >= 0:
                masked[row, self.trie.children(node)[0].tolist()] = 0
        return scores + masked


def hugging_face_beams(model: Any, trie: Trie, prompt: list[int], beams: int) -> list[tuple[list[int], float]]:
    """What `generate` finds: (tokens, score), best first."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        length_penalty=0.0,
        max_new_tokens=trie.max_tokens,
        eos_token_id=trie.eos_token,
        pad_token_id=trie.eos_token,
        logits_processor=LogitsProcessorList([TrieMask(trie, len(prompt))]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = []
    for row, score in zip(output.sequences[:, len(prompt) :].tolist(), output.sequences_scores.tolist(), strict=True):
        found.append((row[: row.index(trie.eos_token) + 1], score))
    return found


def named_weights(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def save_random_model(config: Callable[..., PreTrainedConfig], tokenizer_dir: Path, path: Path) -> None:
    """A model with the tests' tokenizer and random weights. config: makes one from the tokenizer's special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(**ends)).save_pretrained(path)
    tokenizer.save_pretrained(path)


@torch.no_grad()
def assert_same_scores(engine: Any, model: PreTrainedModel) -> None:
    """Of the candidates of some prompts, the sums of the log-probabilities that Hugging Face computes."""
    prompts = [np.random.default_rng(length).integers(1, VOCABULARY, length).tolist() for length in (3, 17, 40)]
    for prompt, group in zip(prompts, generate(engine, prompts, 8), strict=True):
        for tokens, score in zip(group.tokens, group.score, strict=True):
            logp = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logp.gather(1, torch.from_numpy(tokens).long()[:, None]).sum()
            assert abs(score - float(expected)) < 1e-3
