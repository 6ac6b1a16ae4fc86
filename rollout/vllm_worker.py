"""The part of the worker engine that runs inside every vLLM worker."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from catalog.trie import Trie
from rollout.children import Children
from rollout.config import RolloutConfig, Strategy
from rollout.device_trie import DeviceTrie
from rollout.free_sampling import FreeSampleSearch
from rollout.frontier import Frontier, TrieSearch
from rollout.groups import Candidates
from rollout.kv_blocks import BeamBlocks, blocks_needed, most_blocks_needed, passes
from rollout.sampling import SampleSearch
from rollout.search import BeamSearch
from rollout.stochastic import StochasticBeamSearch
from rollout.vllm_arguments import EngineError
from rollout.vllm_internals import PagedModel, TokenBatch
from rollout.vllm_kernels import register_kernels
from rollout.vllm_weights import WeightsWorker

if not torch.cuda.is_available():
    register_kernels()  # tensor-parallel workers are processes of their own

LOGITS_BYTES = (512 if torch.cuda.is_available() else 32) * 2**20
"""Most memory of one piece of logits; more rows are scored piece by piece."""


class SearchWorker(WeightsWorker):
    """Methods that vLLM adds to its worker class; every tensor-parallel rank runs them in lockstep."""

    def start_search(self, trie_path: str, config: RolloutConfig) -> None:
        """Map the trie, and check that this worker's model can be driven."""
        self.paged_model = PagedModel(self.model_runner)
        self.device_trie = DeviceTrie.of(Trie.load(Path(trie_path)), self.paged_model.device)
        self.rollout_config = config

    @torch.inference_mode()
    def search_groups(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[int], strategy: Strategy, size: int
    ) -> list[Candidates]:
        """`size` candidates of every prompt, searched in as many batches as the KV cache requires; [] but on rank 0.

        strategy: any but "dynamic", which selects among samples. seeds: one per prompt; beam search has no use for
        them. Everything else is as the config of `start_search` says.
        """
        found: list[Candidates] = []
        for batch, needed in list(self._batches_that_fit(prompts, strategy, size)):  # refused before anything runs
            search = self._search(strategy, seeds[batch], size)
            self._run(search, prompts[batch], needed)
            found += search.results()  # on every rank, since it checks the logits
        return found if self.paged_model.is_first_rank else []  # nobody reads what the others would send

    def _search(self, strategy: Strategy, seeds: Sequence[int], size: int) -> TrieSearch:
        trie, config = self.device_trie, self.rollout_config
        temperature, space = config.temperature, config.logprob_space
        if strategy == "beam":
            return BeamSearch(trie, len(seeds), size, space, config.forced_chains)
        if strategy == "unconstrained":
            return FreeSampleSearch(trie, seeds, size, temperature, config.max_completion_tokens)
        sampler = SampleSearch if strategy == "sample" else StochasticBeamSearch
        return sampler(trie, seeds, size, temperature, space)

    def _batches_that_fit(
        self, prompts: Sequence[np.ndarray], strategy: Strategy, size: int
    ) -> Iterator[tuple[slice, int]]:
        """Consecutive prompts whose searches fit the KV cache together, and the blocks that these need at most.

        Raises EngineError where the cache is too small for some prompt no longer than the longest here: a cache that
        takes a prompt takes all shorter ones.
        """
        model, config, trie, first = self.paged_model, self.rollout_config, self.device_trie, 0
        beams = size + (strategy == "stochastic_beam")
        level_width = trie.level_width
        if strategy == "unconstrained":
            level_width = np.full(config.max_completion_tokens, beams)
        total = free = model.num_blocks - 1
        lengths = {len(prompt) for prompt in prompts}
        most = most_blocks_needed(max(lengths), beams, level_width, model.block_size)
        if most > total:
            raise EngineError(
                f"a prompt of {max(lengths)} tokens or less with {beams} beams needs {most} KV-cache blocks of "
                f"{model.block_size} tokens, the cache has {total}: raise rollout.kv_cache_gib by a factor of "
                f"{math.ceil(10 * most / total) / 10:.1f}"
            )
        needs = {length: blocks_needed(length, beams, level_width, model.block_size) for length in lengths}
        for i, prompt in enumerate(prompts):
            need = needs[len(prompt)]
            if need > free:
                yield slice(first, i), total - free
                first, free = i, total
            free -= need
        yield slice(first, len(prompts)), total - free

    def _run(self, search: TrieSearch, prompts: Sequence[np.ndarray], needed: int) -> None:
        """Drive a search to its end, the prompts' keys and values shared by all beams of a group.

        needed: blocks of the KV cache. It is given twice as many, if there are, so that copies find neighbouring ones,
        and not the whole cache, since each step looks through all that it is given.
        """
        model = self.paged_model
        blocks = BeamBlocks(prompts, search.beams, min(model.num_blocks, 1 + 2 * needed), model.block_size)
        frontier, hidden = search.frontier(), self._prefill(prompts, blocks)
        while frontier.size:
            search.advance(frontier, self._score(search, frontier, hidden))
            frontier = search.frontier()
            if frontier.size:
                hidden = self._decode(frontier, blocks)

    def _prefill(self, prompts: Sequence[np.ndarray], blocks: BeamBlocks) -> torch.Tensor:
        """Hidden states [P, H] of the last token of every prompt; what prompts share is computed once."""
        length = np.array([len(prompt) for prompt in prompts])
        token = np.concatenate([prompt[first:] for prompt, first in zip(prompts, blocks.shared, strict=True)])
        slot = np.arange(len(prompts)) * blocks.beams
        last = np.cumsum(length - blocks.shared) - 1
        return self._forward(torch.from_numpy(token), slot, blocks.shared, length, blocks, last)

    def _decode(self, frontier: Frontier, blocks: BeamBlocks) -> torch.Tensor:
        """Hidden states [T, H] of the tokens that lead to the frontier's nodes."""
        self.paged_model.copy_blocks(*blocks.follow(frontier.parent))
        start = blocks.length[frontier.slot]
        blocks.extend(frontier.slot, frontier.count)
        every = np.arange(len(frontier.fanout))
        return self._forward(frontier.token, frontier.slot, start, start + frontier.count, blocks, every)

    def _forward(
        self,
        token: torch.Tensor,
        slot: np.ndarray,
        start: np.ndarray,
        stop: np.ndarray,
        blocks: BeamBlocks,
        wanted: np.ndarray,
    ) -> torch.Tensor:
        """Hidden states [K, H] of the tokens `wanted`, in passes of at most the engine's token budget.

        token: int32 [T], those of beam slot[0] first. start, stop: int64 [N], positions of each beam's tokens. wanted:
        int64 [K], ascending, of 0..T-1.
        """
        model, hidden = self.paged_model, []
        token = token.to(model.device, non_blocking=True)
        for first, last, row, begin, end in passes(start, stop, model.max_batched_tokens, model.max_rows):
            count = end - begin
            of_token = np.repeat(np.arange(len(count)), count)
            position = np.arange(last - first) - (np.cumsum(count) - count - begin)[of_token]
            batch = TokenBatch(
                token=token[first:last],
                position=position,
                slot=blocks.places(slot[row][of_token], position),
                count=count.astype(np.int32),
                length=end.astype(np.int32),
                table=blocks.table[slot[row]],
                wanted=wanted[(wanted >= first) & (wanted < last)] - first,
            )
            hidden.append(model.forward(batch))
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    def _score(self, search: TrieSearch, frontier: Frontier, hidden: torch.Tensor) -> Children:
        """The children of every frontier node, the logits computed a bounded piece at a time."""
        rows = max(1, LOGITS_BYTES // (self.paged_model.vocab_size * hidden.element_size()))
        pieces = [slice(start, start + rows) for start in range(0, len(hidden), rows)]
        children = Children.cat(
            [search.children(frontier, piece, self.paged_model.logits(hidden[piece])) for piece in pieces]
        )
        return children.map(lambda values, _: self.paged_model.agree(values))
