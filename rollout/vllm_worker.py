"""The part of the worker engine that runs inside every vLLM worker."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from catalog.trie import Trie
from rollout.config import LogprobSpace
from rollout.groups import Candidates
from rollout.kv_blocks import BeamBlocks, blocks_needed, prefill_pieces
from rollout.search import BeamSearch, Children, DeviceTrie, Frontier, top_children
from rollout.vllm_engine import EngineError
from rollout.vllm_internals import PagedModel, TokenBatch
from rollout.vllm_weights import WeightsWorker

LOGITS_BYTES = 128 * 2**20
"""Most memory of one piece of logits; more rows are scored piece by piece."""


class SearchWorker(WeightsWorker):
    """Methods that vLLM adds to its worker class; every tensor-parallel rank runs them in lockstep."""

    def start_search(self, trie_path: str, logprob_space: LogprobSpace) -> None:
        """Map the trie and check that this worker's model can be driven."""
        self.paged_model = PagedModel(self.model_runner)
        self.device_trie = DeviceTrie.of(Trie.load(Path(trie_path)), self.paged_model.device)
        self.logprob_space = logprob_space

    @torch.inference_mode()
    def search_groups(self, prompts: Sequence[np.ndarray], beams: int) -> list[Candidates]:
        """Candidates of every prompt, searched in as many batches as the KV cache requires."""
        batches = self._batches_that_fit(prompts, beams)
        return [group for batch in batches for group in self._search([prompts[i] for i in batch], beams)]

    def _batches_that_fit(self, prompts: Sequence[np.ndarray], beams: int) -> Iterator[list[int]]:
        """Indices of consecutive prompts whose searches fit the KV cache together."""
        model, widths = self.paged_model, self.device_trie.level_width
        batch: list[int] = []
        free = model.num_blocks - 1
        for i, prompt in enumerate(prompts):
            need = blocks_needed(len(prompt), beams, widths, model.block_size)
            if need > model.num_blocks - 1:
                raise EngineError(
                    f"a prompt of {len(prompt)} tokens with {beams} beams needs {need} KV-cache blocks of "
                    f"{model.block_size} tokens, the cache has {model.num_blocks - 1}: raise rollout.kv_cache_gib "
                    f"by a factor of {need / (model.num_blocks - 1):.1f}"
                )
            if need > free:
                yield batch
                batch, free = [], model.num_blocks - 1
            batch.append(i)
            free -= need
        if batch:
            yield batch

    def _search(self, prompts: Sequence[np.ndarray], beams: int) -> list[Candidates]:
        model = self.paged_model
        search = BeamSearch(self.device_trie, len(prompts), beams)
        blocks = BeamBlocks(prompts, beams, model.num_blocks, model.block_size)
        frontier, hidden = search.frontier(), self._prefill(prompts, blocks)
        while frontier.size:
            search.advance(frontier, self._score(hidden, frontier, 2 * beams))
            frontier = search.frontier()
            if frontier.size:
                hidden = self._decode(frontier, blocks)
        return search.results()

    def _prefill(self, prompts: Sequence[np.ndarray], blocks: BeamBlocks) -> torch.Tensor:
        """Hidden states [P, H] of the last token of every prompt, computed a token budget at a time."""
        model, last = self.paged_model, []
        lengths = np.array([len(prompt) for prompt in prompts])
        for group, start, stop in prefill_pieces(lengths, blocks.shared, model.max_batched_tokens):
            count = stop - start
            row = np.repeat(np.arange(len(group)), count)
            position = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - start, count)
            slot = group * blocks.beams
            token = np.concatenate([prompts[g][a:b] for g, a, b in zip(group, start, stop, strict=True)])
            batch = TokenBatch(
                token=torch.from_numpy(token.astype(np.int32)).to(model.device, non_blocking=True),
                position=position,
                slot=blocks.slots_of(slot[row], position),
                count=count.astype(np.int32),
                length=stop.astype(np.int32),
                table=blocks.table[slot],
            )
            ends = np.cumsum(count) - 1
            last.append(model.forward(batch)[ends[stop == lengths[group]]])
        return torch.cat(last)

    def _decode(self, frontier: Frontier, blocks: BeamBlocks) -> torch.Tensor:
        """Hidden states [R, H] of the tokens that led to the frontier."""
        model = self.paged_model
        model.copy_blocks(*blocks.follow(frontier.parent))
        blocks.extend(frontier.slot, np.ones(frontier.size, np.int64))
        hidden = []
        for start in range(0, frontier.size, model.max_batched_tokens):
            rows = slice(start, start + model.max_batched_tokens)
            slot = frontier.slot[rows]
            length = blocks.length[slot]
            batch = TokenBatch(
                token=frontier.token[rows],
                position=length - 1,
                slot=blocks.slots_of(slot, length - 1),
                count=np.ones(len(slot), np.int32),
                length=length.astype(np.int32),
                table=blocks.table[slot],
            )
            hidden.append(model.forward(batch))
        return torch.cat(hidden)

    def _score(self, hidden: torch.Tensor, frontier: Frontier, keep: int) -> Children:
        """The best children of every frontier node, the logits computed a bounded piece at a time."""
        rows = max(1, LOGITS_BYTES // (self.paged_model.vocab_size * hidden.element_size()))
        pieces = [slice(start, start + rows) for start in range(0, frontier.size, rows)]
        return Children.cat(
            [
                top_children(
                    self.device_trie,
                    self.paged_model.logits(hidden[piece]),
                    frontier.node[piece],
                    frontier.fanout[piece],
                    keep,
                    self.logprob_space,
                )
                for piece in pieces
            ]
        )
