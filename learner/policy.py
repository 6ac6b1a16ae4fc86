"""The policy: a causal language model that maps a packed batch to its candidates' log-probabilities."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from catalog.trie import Trie
from learner.attention import IMPLEMENTATION, packing_refusal
from learner.last_layer import use_last_layer
from learner.lean_layers import use_lean_layers
from learner.logprobs import HEAD_TOLERANCE, LogprobHead, check_head
from learner.packing import PackedBatch, pack_groups, packed_tokens, padded_batch
from learner.products import compiles_every_length, rounded_rows, use_best_products
from learner.tree_mask import TreeMask
from learner.trie_logprobs import TrieSpace, trie_logprobs

CUDA_BUCKET = 512
# Packed rows are padded to a multiple of this many tokens on CUDA, so that compiled attention sees few lengths.


class Policy(nn.Module):
    """Wraps any Hugging Face causal LM; a reference model is a Policy under `torch.no_grad()`.

    >>> policy = Policy(AutoModelForCausalLM.from_pretrained(path))
    >>> batch = policy.pack(prompts, candidates)
    >>> logp = policy(batch)                      # float32 [C, T], 0 where batch.mask is False

    A model that cannot be fed a packed tree gets padded batches, after one warning that says why. With a trie,
    log-probabilities are renormalised over its allowed tokens; without, they are over the vocabulary.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        packing: Literal["tree", "padded"] = "tree",
        logit_mib: float = 256,
        trie: Trie | None = None,
    ) -> None:
        super().__init__()
        use_best_products(lm)
        use_lean_layers(lm)
        self.lm = lm
        self.head = LogprobHead(lm.get_output_embeddings(), lm.config, logit_mib)
        self.trie_space = None if trie is None else TrieSpace(trie)
        lm.set_attn_implementation(_padded_attention(lm))
        check_head(lm, self.head)
        if packing == "tree" and (refusal := packing_refusal(lm) or self._unequal_when_packed()) is not None:
            warnings.warn(f"{type(lm).__name__} is trained on padded batches: {refusal}", stacklevel=2)
            packing = "padded"
        self.packing = packing
        if packing == "tree":
            lm.set_attn_implementation(IMPLEMENTATION)
            use_last_layer(lm)

    @torch.no_grad()
    def _unequal_when_packed(self) -> str | None:
        """Why this model cannot be fed a packed tree, found out by doing so; leaves its attention as it was.

        Numbers are compared in float32 alone: in less, some models round by whole units.
        """
        lm, implementation, training = self.lm, self.lm.config._attn_implementation, self.lm.training
        tokens = [token % lm.config.get_text_config().vocab_size for token in range(1, 12)]
        prompts, candidates = [tokens[:5]], [[tokens[5:8], [*tokens[5:7], tokens[0]], tokens[8:]]]
        lm.eval()
        try:
            expected = self(padded_batch(prompts, candidates).to(lm.device)) if lm.dtype == torch.float32 else None
            lm.set_attn_implementation(IMPLEMENTATION)
            found = self(pack_groups(prompts, candidates).to(lm.device))
        except NotImplementedError as error:
            return str(error).partition(":")[0]
        finally:
            lm.set_attn_implementation(implementation)
            lm.train(training)
        difference = 0.0 if expected is None else float((found - expected).abs().max())
        if expected is None or difference <= HEAD_TOLERANCE[lm.dtype] * float(expected.abs().max() + 1.0):
            return None
        return f"its log-probabilities in a packed tree differ by {difference:.3g} from those in padded batches"

    def pack(self, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]]) -> PackedBatch:
        """The batch of some groups on the policy's device; arguments and errors as `pack_groups`."""
        if self.packing == "padded":
            batch = padded_batch(prompts, candidates)
        else:
            batch = pack_groups(prompts, candidates, self._rounded)
        if self.trie_space is not None:
            batch = replace(batch, choices=self.trie_space.choices(batch))
        return batch.to(self.lm.device)

    def _rounded(self, tokens: int) -> int:
        """The length of a packed row that the device is to see."""
        if self.lm.device.type == "cuda":
            return -(-tokens // CUDA_BUCKET) * CUDA_BUCKET
        return rounded_rows(tokens) if compiles_every_length(self.lm.dtype) else tokens

    def group_tokens(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]]
    ) -> list[int]:
        """Tokens that each group adds to a batch: packed alone, or padded to the longest sequence of all of them."""
        if self.packing == "tree":
            return packed_tokens(prompts, candidates)
        width = max(
            (len(prompt) + max(map(len, rows)) for prompt, rows in zip(prompts, candidates, strict=True)), default=0
        )
        return [len(rows) * width for rows in candidates]

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """float32 [C, T]: log-probability of every candidate token, 0 where batch.mask is False."""
        hidden = self._hidden(batch)
        if batch.choices is not None:
            return trie_logprobs(self.head, hidden, batch.choices)
        logp = self.head(hidden, batch.edge_row, batch.edge_target, batch.row_edges)
        of_token = logp.index_select(0, batch.edge.flatten()).view(batch.edge.shape)
        return of_token.masked_fill(~batch.mask, 0.0)

    def _hidden(self, batch: PackedBatch) -> torch.Tensor:
        """[K, D]: the last hidden states of the fed tokens that have a target."""
        tree, mask = {}, batch.attention_mask
        if batch.subtree_end is not None:
            tree["tree"] = TreeMask(batch.subtree_end, batch.positions[0], batch.rows)
            # Read by nobody; without one, transformers asks the device whether positions are of several sequences.
            mask = torch.ones_like(batch.tokens, dtype=torch.bool)
        output = self.lm.base_model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=mask,
            use_cache=False,
            **tree,
        )
        hidden = output.last_hidden_state.flatten(0, 1)
        return hidden if len(hidden) == len(batch.rows) else hidden[batch.rows]  # the former from a LastLayer


def _padded_attention(lm: PreTrainedModel) -> str:
    """The attention implementation for padded batches: fused attention leaves out a softcap."""
    softcap = getattr(lm.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if softcap is None and lm._supports_sdpa else "eager"
