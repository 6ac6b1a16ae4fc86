"""The learner of one rank: the policy with its optimizer and reference, fine-tuned, updated, exported and saved."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import GenerationConfig, PreTrainedModel

from catalog.catalog import Catalog
from catalog.trie import Trie
from learner import checkpoint
from learner.config import LearnerConfig
from learner.engine import DTYPES, ZeroEngine, to_universal
from learner.experience import Experience
from learner.export import named_weights, save_huggingface, weight_buckets, weights_checksum
from learner.lora import adapter_weights, add_adapters, with_own_adapters
from learner.policy import Policy
from learner.pretrained import load_pretrained
from learner.random_state import random_state, restore_random_state
from learner.reference import Reference, shares_weights
from learner.sft import SupervisedFineTuning
from learner.update import PolicyUpdate
from rollout.config import LogprobSpace
from rollout.host_memory import WORTH_RETURNING, return_freed_memory
from rollout.weights import WeightBucket


class Learner:
    """One rank; the process group of all ranks must stand (learner.engine.join_process_group).

    >>> learner = Learner(model_path, catalog, config, "vocabulary", total_steps=1000, staleness=0, device=device)
    >>> for report in learner.sft(folder): ...
    >>> metrics = learner.step(tables)
    >>> for bucket in learner.export_weights(): ...

    All methods must be called on all ranks.
    """

    def __init__(
        self,
        model_path: str,
        catalog: Catalog,
        config: LearnerConfig,
        logprob_space: LogprobSpace,
        total_steps: int,
        staleness: int,
        device: torch.device,
        seed: int = 0,
    ):
        """model_path: Hugging Face directory of the policy before SFT. total_steps: RL steps of the whole run.

        seed: of new adapters, their dropout and the order of SFT.
        """
        self._config, self._catalog, self._seed = config, catalog, seed
        trie = catalog.trie if logprob_space == "trie" else None
        self._tokenizer_path = model_path
        torch.manual_seed(seed)  # new adapters are the same on every rank
        self.policy = self._as_policy(self._load_model(model_path, trainable=True), trie)
        self.engine = ZeroEngine(self.policy, config, config.optimizer)
        torch.manual_seed(seed + self.engine.rank)
        self._reference = self._new_reference(model_path, trie, device) if config.beta else None
        self._update = PolicyUpdate(self.engine, self.policy, self._reference, config, total_steps, staleness)

    def sft(self, folder: Path) -> Iterator[dict[str, float]]:
        """Fine-tune the policy; afterwards it is the reference, and the optimizer starts anew.

        folder: of the epochs that are done, where one that was broken off goes on; see SupervisedFineTuning.run.
        """
        trie_space, self.policy.trie_space = self.policy.trie_space, None  # titles are learned over the vocabulary
        yield from SupervisedFineTuning(self.engine, self.policy, self._catalog, self._config, self._seed).run(folder)
        self.policy.trie_space = trie_space
        self.engine.restart_optimizer(self._config.optimizer)
        if self._reference is not None:
            self._reference.follow(alpha=1.0)

    def step(self, tables: Sequence[pa.Table]) -> dict[str, float]:
        """One RL step on all groups of the tables, which have a `reward` column; see PolicyUpdate.step."""
        return self._update.step(Experience.from_tables(tables))

    def check_rollouts(self, tables: Sequence[pa.Table]) -> None:
        """Raise MismatchError unless these groups come from the present weights; see PolicyUpdate.check_rollouts."""
        self._update.check_rollouts(Experience.from_tables(tables))

    def return_freed_memory(self) -> None:
        """Give the system, or the GPU, what freed tensors have left; a small model on a CPU keeps it."""
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()
        elif sum(map(self.engine.full_bytes, self.policy.parameters())) >= WORTH_RETURNING:
            return_freed_memory()

    def export_weights(self) -> Iterator[WeightBucket]:
        """All weights in buckets on rank 0, nothing on the others."""
        return weight_buckets(self.engine, self.policy.lm)

    def weights_checksum(self) -> int:
        """rollout.weights.checksum of what export_weights sends."""
        return weights_checksum(self.engine, self.policy.lm)

    def save_huggingface(self, path: Path) -> None:
        """Write weights, configuration and tokenizer for from_pretrained."""
        save_huggingface(self.engine, self.policy.lm, self._tokenizer_path, path)

    def save_checkpoint(self, path: Path, state: dict[str, Any], keep: int | None) -> None:
        """Write everything that a later run needs to go on as if it had never stopped; see learner.checkpoint.

        state: what the driver wants back, such as its data position. keep: checkpoints of this folder that stay.
        Raises CannotWrite naming the checkpoint.
        """
        folder = checkpoint.temporary_path(path)
        if self.engine.rank == 0:
            checkpoint.begin(path)
        self.engine.barrier()
        written = {**self.engine.signature, "updates_done": self._update.updates_done, "driver": state}
        with checkpoint.writing_tensors(path):
            self.engine.save(folder / "zero")
            self.save_huggingface(folder)
            torch.save(random_state(self.engine.device), folder / f"rng-{self.engine.rank}.pt")
            if self.engine.rank == 0 and self._reference is not None:
                self._reference.save(folder / checkpoint.REFERENCE)
            self.engine.barrier()
            if self.engine.rank == 0:
                checkpoint.commit(path, written, keep)
        self.engine.barrier()

    def load_checkpoint(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint; returns the driver's state.

        The number of ranks may differ from that of the writer; with the same number training goes on bit for bit.
        Raises CheckpointError for a damaged checkpoint, or one of another ZeRO stage or precision.
        """
        self.engine.on_rank_0(lambda: checkpoint.check(path))
        state, ours = checkpoint.read_state(path), self.engine.signature
        checkpoint.check_readers(path, ours)
        if state["ranks"] == ours["ranks"] or ours["zero_stage"] == 0:
            self.engine.load(path / "zero")
        else:
            self._load_other_ranks(path)
        if (random := path / f"rng-{self.engine.rank}.pt").exists():
            restore_random_state(torch.load(random), self.engine.device)
        if self._reference is not None:
            self._reference.load(path / checkpoint.REFERENCE)
        self._update.updates_done = state["updates_done"]
        return state["driver"]

    def _load_other_ranks(self, path: Path) -> None:
        folder = path.with_name(f".{path.name}.universal")  # DeepSpeed also writes beside what it is asked for
        if self.engine.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self.engine.on_rank_0(lambda: to_universal(path / "zero", folder / "zero"))
        self.engine.load_universal(folder / "zero")
        self.engine.barrier()
        if self.engine.rank == 0:
            shutil.rmtree(folder)

    def _new_reference(self, model_path: str, trie: Trie | None, device: torch.device) -> Reference:
        """Of the policy before any training."""
        lm = self.policy.lm
        if shares_weights(self._config):
            frozen = self._as_policy(with_own_adapters(lm), trie)
            return Reference(frozen, lambda: [list(adapter_weights(lm).items())], device, offload=False)
        frozen = self._as_policy(self._load_model(model_path, trainable=False), trie)
        source = partial(named_weights, self.engine, lm)
        return Reference(frozen, source, device, self._config.reference_offload)

    def _load_model(self, model_path: str, trainable: bool) -> PreTrainedModel:
        config = self._config
        lm = load_pretrained(model_path, DTYPES[config.dtype])
        drop_invalid_sampling(lm)
        if trainable:  # the reference is in evaluation mode
            without_dropout(lm)
        if trainable and config.lora.rank:
            add_adapters(lm, config.lora)
        if trainable and config.gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train(trainable)
        return lm

    def _as_policy(self, lm: PreTrainedModel, trie: Trie | None) -> Policy:
        return Policy(lm, packing=self._config.packing, logit_mib=self._config.logit_mib, trie=trie)


def drop_invalid_sampling(lm: PreTrainedModel) -> None:
    """Leave only special tokens of a generation configuration that transformers loads, but would refuse to save.

    Its sampling defaults have no effect here: rollouts ignore them.
    """
    try:
        lm.generation_config.validate(strict=True)
    except ValueError:
        bos, eos, pad = (getattr(lm.generation_config, f"{name}_token_id") for name in ("bos", "eos", "pad"))
        pad = None if pad is not None and pad < 0 else pad  # Llama's -1, which is refused as well
        lm.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)


def without_dropout(lm: PreTrainedModel) -> None:
    """A policy is what its rollouts came from: the dropout of the model itself stays off; adapters keep theirs.

    Raises NotImplementedError for a model that is random in some other way.
    """
    _zero_dropout(lm.modules())
    if _is_random(lm):
        _zero_dropout([lm.config.get_text_config()])  # some architectures read it there in every pass
    if _is_random(lm):
        raise NotImplementedError(
            f"{type(lm).__name__} computes other logits each time when it is trained, and not by a dropout that could "
            "be turned off: its updates would be those of another policy than the one that rolled out"
        )


def _zero_dropout(holders: Iterable[Any]) -> None:
    for holder in holders:
        if isinstance(holder, torch.nn.modules.dropout._DropoutNd):
            holder.p = 0.0
        for name, value in vars(holder).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(holder, name, 0.0)


@torch.no_grad()
def _is_random(lm: PreTrainedModel) -> bool:
    """Whether two passes in training mode differ."""
    tokens = torch.arange(8, device=lm.device)[None] % lm.config.get_text_config().vocab_size
    lm.train()
    first, second = (lm(input_ids=tokens, use_cache=False).logits for _ in range(2))
    return not torch.equal(first, second)
