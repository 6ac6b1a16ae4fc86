"""Log-probabilities renormalised over what the title trie allows at each token: `logprob_space: trie`."""

from functools import cached_property

import numpy as np
import torch
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from catalog.trie import Trie
from learner.logprobs import LogprobHead
from learner.packing import Choices, PackedBatch


class TrieSpace:
    """Finds the allowed tokens of every candidate token of a batch.

    >>> choices = TrieSpace(trie).choices(batch)
    >>> logp = trie_logprobs(head, hidden, choices)      # [C, T]
    """

    def __init__(self, trie: Trie) -> None:
        self.trie = trie

    @cached_property
    def _edge_key(self) -> np.ndarray:
        """int64 [edges], ascending: node * base + token."""
        nodes = np.repeat(np.arange(self.trie.num_nodes), np.diff(self.trie.first_edge))
        return nodes * self._base + self.trie.edge_token

    @cached_property
    def _base(self) -> int:
        return int(self.trie.edge_token.max()) + 1

    def choices(self, batch: PackedBatch) -> Choices:
        """Of a batch on the CPU. Raises ValueError for a candidate that is no path of the trie."""
        mask, edge = batch.mask.numpy(), batch.edge.numpy()
        node, taken = self._walk(batch.edge_target.numpy()[edge], mask)
        first, count = self.trie.first_edge[node], np.diff(self.trie.first_edge)[node]
        open_choice = mask & (count > 1)
        row = batch.edge_row.numpy()[edge]
        keys = row.astype(np.int64) * len(self._edge_key) + taken
        _, member, choice = np.unique(keys[open_choice], return_index=True, return_inverse=True)
        first, count, row, taken = (values[open_choice][member] for values in (first, count, row, taken))
        start = np.cumsum(count) - count
        edges = np.arange(count.sum()) + np.repeat(first - start, count)
        index = np.full(mask.shape, -1, np.int64)
        index[open_choice] = choice
        arrays = (
            np.repeat(row, count),
            self.trie.edge_token[edges],
            np.repeat(np.arange(len(count)), count),
            start + taken - first,
            index,
        )
        return Choices(*(torch.from_numpy(array.astype(np.int64)) for array in arrays))

    def _walk(self, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The node before every token and the edge that the token takes, int64 [C, T]."""
        node, taken = np.zeros(tokens.shape, np.int64), np.zeros(tokens.shape, np.int64)
        at = np.zeros(len(tokens), np.int64)
        for step in range(tokens.shape[1]):
            alive = mask[:, step]
            key = at * self._base + tokens[:, step]
            edge = np.minimum(np.searchsorted(self._edge_key, key), len(self._edge_key) - 1)
            lost = np.flatnonzero(alive & ((self._edge_key[edge] != key) | (tokens[:, step] >= self._base)))
            if len(lost):
                raise ValueError(
                    f"candidate {lost[0]} of the batch leaves the title trie at token {step}; "
                    "logprob_space=trie needs a constrained rollout strategy"
                )
            node[alive, step], taken[alive, step] = at[alive], edge[alive]
            at = np.where(alive, self.trie.edge_target[edge], at)
        return node, taken


def trie_logprobs(head: LogprobHead, hidden: torch.Tensor, choices: Choices) -> torch.Tensor:
    """float32 [C, T]: log-softmax over the allowed tokens, 0 where only one is allowed and where masked.

    hidden: [K, D], the hidden states of the batch's `rows`. Raises nothing; a chunk holds as many numbers as the
    logits of `head.chunk_rows` tokens would.
    """
    weight, bias = head.weights()
    size = max(1, head.chunk_rows(weight) * weight.shape[0] // weight.shape[1])
    logits = [
        checkpoint(_project, hidden, weight, bias, rows, tokens, use_reentrant=False)
        for rows, tokens in zip(choices.row.split(size), choices.token.split(size), strict=True)
    ]
    allowed = head.transform(torch.cat(logits))
    highest = allowed.detach().new_full((len(choices.chosen),), -torch.inf)
    highest = highest.scatter_reduce(0, choices.choice, allowed.detach(), "amax")
    exponentials = (allowed - highest[choices.choice]).exp()
    normalizer = torch.zeros_like(highest).index_add(0, choices.choice, exponentials).log() + highest
    logp = torch.cat([allowed[choices.chosen] - normalizer, allowed.new_zeros(1)])
    return logp.index_select(0, choices.index.flatten() % len(logp)).view(choices.index.shape)


def _project(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """[P]. By embedding, not by indexing, whose gradient adds up in another order each time on a CPU."""
    projected = (embedding(rows, hidden) * embedding(tokens, weight)).sum(-1)
    return projected if bias is None else projected + embedding(tokens, bias[:, None])[:, 0]
