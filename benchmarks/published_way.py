"""The opponent: one training step written as the published code does it, with Hugging Face transformers alone.

Prompts are left-padded and repeated once per beam, `generate` does the constrained beam search, the reference and the
policy read every prompt once per candidate and project only the completions onto the vocabulary. Candidates, losses
and gradients are those of the published code (tests/test_published_way.py), so that only time and memory differ.

Where the published code leaves time on the table by accident it is not copied: the trie mask is vectorised, generation
and scoring run without autograd and in evaluation mode, and gradient checkpointing is a choice.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from catalog.trie import Trie

FORBIDDEN = -1e6
"""What the published processor adds to the log-probability of a token outside the trie."""


class TrieLogitsProcessor(LogitsProcessor):
    """Adds FORBIDDEN to every token that does not continue a title; all rows at once."""

    def __init__(self, trie: Trie, prompt_width: int, vocabulary: int, device: torch.device | str = "cpu") -> None:
        self.prompt_width, self.vocabulary = prompt_width, vocabulary
        self.first_edge = torch.tensor(trie.first_edge, device=device)
        self.edge_token = torch.tensor(trie.edge_token, device=device).long()
        self.edge_target = torch.tensor(trie.edge_target, device=device).long()
        parent = torch.repeat_interleave(torch.arange(trie.num_nodes, device=device), self.first_edge.diff())
        self.edge_key = parent * vocabulary + self.edge_token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [rows, prompt_width + t], scores: log-probabilities [rows, vocabulary]."""
        node, alive = self._walk(input_ids[:, self.prompt_width :])
        start, end = self.first_edge[node], self.first_edge[node + 1]
        count = torch.where(alive, end - start, 0)
        row = torch.repeat_interleave(torch.arange(len(node), device=node.device), count)
        edge = torch.arange(len(row), device=node.device) + (start - (count.cumsum(0) - count))[row]
        allowed = row * self.vocabulary + self.edge_token[edge]
        masked = scores + FORBIDDEN
        masked.view(-1)[allowed] = scores.reshape(-1)[allowed]
        return masked

    def _walk(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(node, whether the row is still in the trie) after tokens [rows, t]."""
        node = tokens.new_zeros(len(tokens))
        alive = torch.ones_like(node, dtype=torch.bool)
        for column in tokens.T:
            key = node * self.vocabulary + column
            edge = torch.searchsorted(self.edge_key, key).clamp_max(len(self.edge_key) - 1)
            alive &= (self.edge_key[edge] == key) & (self.edge_target[edge] >= 0)
            node = torch.where(alive, self.edge_target[edge], 0)
        return node, alive


class PrefixAllowedTokens:
    """The same constraint as Hugging Face's own `prefix_allowed_tokens_fn`: a Python walk per row and step."""

    def __init__(self, trie: Trie, prompt_width: int) -> None:
        self.trie, self.prompt_width = trie, prompt_width

    def __call__(self, batch_id: int, input_ids: torch.Tensor) -> list[int]:
        node = 0
        for token in input_ids[self.prompt_width :].tolist():
            target = self.trie.step(node, token)
            if target is None or target < 0:
                return [self.trie.eos_token]  # a beam that has no title; the function must allow something
            node = target
        return self.trie.children(node)[0].tolist()


@dataclass(frozen=True)
class Completions:
    """Candidates of n prompts, G neighbouring rows each, best first."""

    ids: torch.Tensor
    """int64 [n * G, P + T]: left-padded prompt, completion, padding."""
    mask: torch.Tensor
    """int64 [n * G, P + T]: 1 on the prompt and on the completion up to its first end-of-sequence."""
    prompt_width: int
    """P"""

    def groups(self, groups: slice, group_size: int) -> "Completions":
        """Some of the groups."""
        rows = slice(groups.start * group_size, groups.stop * group_size)
        return Completions(self.ids[rows], self.mask[rows], self.prompt_width)

    def tokens(self) -> list[list[int]]:
        """Completion of every row, end-of-sequence included."""
        completions, mask = self.ids[:, self.prompt_width :], self.mask[:, self.prompt_width :].bool()
        return [row[kept].tolist() for row, kept in zip(completions, mask, strict=True)]


@dataclass
class StepReport:
    """What a step did: the loss over all groups, the gradient norm before clipping, candidates, seconds by stage."""

    loss: float = 0.0
    gradient_norm: float = 0.0
    tokens: list[list[int]] = field(default_factory=list)
    """n * G completions, group after group, best first."""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class PublishedTrainer:
    """Policy, reference and AdamW (float32 master weights beside bfloat16 ones, as DeepSpeed keeps them).

    >>> trainer = PublishedTrainer(model_path, trie, dtype="float32")
    >>> report = trainer.step(prompts, target_classes)
    """

    def __init__(
        self,
        model_path: str,
        trie: Trie,
        *,
        dtype: str = "float32",
        group_size: int = 16,
        beta: float = 1e-3,
        learning_rate: float = 1e-5,
        gradient_checkpointing: bool = True,
        python_mask: bool = False,
        device: str = "cuda" if torch.cuda.is_available() else "cpu",
    ) -> None:
        self.trie, self.group_size, self.beta, self.python_mask = trie, group_size, beta, python_mask
        self.policy = _load(model_path, dtype, device)
        self.reference = _load(model_path, dtype, device).eval().requires_grad_(False) if beta else None
        if gradient_checkpointing:
            self.policy.gradient_checkpointing_enable({"use_reentrant": False})
        self.weights: list[torch.Tensor] = list(self.policy.parameters())
        same = dtype == "float32"
        self.master = self.weights if same else [weight.detach().float().requires_grad_() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.master, learning_rate, weight_decay=0.0)

    def step(
        self,
        prompts: Sequence[Sequence[int]],
        target_classes: Sequence[int],
        *,
        generate_groups: int = 4,
        learn_groups: int = 1,
    ) -> StepReport:
        """One optimizer step on a group per prompt: so many at a time in `generate`, so many in a forward pass.

        len(prompts) must be a multiple of generate_groups, and that of learn_groups.
        """
        report = StepReport()
        for start in range(0, len(prompts), generate_groups):
            batch = slice(start, start + generate_groups)
            with report.stage("rollout"):
                completions = self.generate(prompts[batch])
            with report.stage("reward"):
                tokens = completions.tokens()
                advantage = advantages(self.rewards(tokens, target_classes[batch]))
            report.tokens += tokens
            for group in range(0, len(advantage), learn_groups):
                learned = slice(group, group + learn_groups)
                share = learn_groups / len(prompts)
                report.loss += self.accumulate(
                    completions.groups(learned, self.group_size), advantage[learned], share, report
                )
        with report.stage("learn"):
            report.gradient_norm = self.update()
        return report

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]]) -> Completions:
        """Constrained beam search of width G, all G returned, summed log-probabilities."""
        device, pad = self.policy.device, self.trie.eos_token
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        processor = TrieLogitsProcessor(self.trie, width, self.policy.config.vocab_size, device)
        constraint = (
            {"prefix_allowed_tokens_fn": PrefixAllowedTokens(self.trie, width)}
            if self.python_mask
            else {"logits_processor": LogitsProcessorList([processor])}
        )
        self.policy.eval()
        generated = self.policy.generate(
            input_ids=ids,
            attention_mask=mask,
            num_beams=self.group_size,
            num_return_sequences=self.group_size,
            do_sample=False,
            length_penalty=0.0,
            max_new_tokens=self.trie.max_tokens,
            eos_token_id=self.trie.eos_token,
            pad_token_id=pad,
            **constraint,
        )
        ended = (generated[:, width:] == self.trie.eos_token).long()
        completion_mask = ((ended.cumsum(1) - ended) == 0).long()
        prompt_mask = mask.repeat_interleave(self.group_size, 0)
        return Completions(generated, torch.cat([prompt_mask, completion_mask], 1), width)

    def rewards(self, tokens: Sequence[Sequence[int]], target_classes: Sequence[int]) -> torch.Tensor:
        """rule + ranking of every candidate, float32 [n, G]; the ranking part is 0 in a group without a hit."""
        targets = [self.trie.title_tokens(target) for target in target_classes for _ in range(self.group_size)]
        hit = torch.tensor([list(row) == target for row, target in zip(tokens, targets, strict=True)])
        hit = hit.view(-1, self.group_size)
        weight = 1 / torch.log2(torch.arange(self.group_size) + 2.0)
        ranking = torch.where(hit, 0.0, -weight / weight.sum()) * hit.any(1, keepdim=True)
        return hit + ranking

    def log_probs(self, model: torch.nn.Module, completions: Completions) -> torch.Tensor:
        """Log-probability of every completion token, float32 [n * G, T]."""
        ids, width = completions.ids, completions.prompt_width
        kept = ids.shape[1] - width
        output = model(input_ids=ids, attention_mask=completions.mask, use_cache=False, logits_to_keep=kept + 1)
        logits = output.logits[:, :-1].float()
        chosen = logits.gather(-1, ids[:, width:, None]).squeeze(-1)
        return chosen - logits.logsumexp(-1)

    def accumulate(
        self, completions: Completions, advantages: torch.Tensor, share: float, report: StepReport
    ) -> float:
        """Add the gradient of n groups, which are `share` of the step; returns their part of the loss.

        advantages: float32 [n, G].
        """
        mask = completions.mask[:, completions.prompt_width :]
        advantage = advantages.reshape(-1, 1).to(mask.device)
        with report.stage("reference"), torch.no_grad():
            reference = None if self.reference is None else self.log_probs(self.reference, completions)
        with report.stage("learn"):
            self.policy.train()
            policy = self.log_probs(self.policy, completions)
            per_token = -torch.exp(policy - policy.detach()) * advantage
            if reference is not None:
                per_token = per_token + self.beta * (torch.exp(reference - policy) - (reference - policy) - 1)
            loss = ((per_token * mask).sum(1) / mask.sum(1)).mean() * share
            loss.backward()
        return loss.item()

    def update(self) -> float:
        """Clip to norm 0.3, AdamW, clear the gradients; returns the norm before clipping."""
        if self.master is not self.weights:
            for master, weight in zip(self.master, self.weights, strict=True):
                master.grad = weight.grad.float() if weight.grad is not None else None
        norm = torch.nn.utils.clip_grad_norm_(self.master, 0.3)
        self.optimizer.step()
        if self.master is not self.weights:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.master)
        for parameter in [*self.weights, *self.master]:
            parameter.grad = None
        return float(norm)


def _load(model_path: str, dtype: str, device: str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
    return model.to(device)


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(r - mean) / (std + 1e-4) within each group; rewards [n, G]."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
