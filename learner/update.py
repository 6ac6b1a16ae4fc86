"""One step of reinforcement learning: advantages, micro-batches, reference, objective, optimizer."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.advantages import informative
from learner.config import LearnerConfig
from learner.engine import ZeroEngine
from learner.experience import Experience
from learner.micro_batches import plan_micro_batches
from learner.mismatch import check_mismatch
from learner.objectives import CompletionBatch, gets_rollout, resolve
from learner.packing import PackedBatch, to_device
from learner.phase_timer import PhaseTimer
from learner.policy import Policy
from learner.reference import Reference
from learner.schedule import learning_rate
from rollout.groups import INCLUSION_WEIGHT, GroupTableError

TOTALS = ("loss", "completion_tokens", "packed_tokens")
"""Metrics of an update that are summed over all ranks; the others are means over the candidates that were fed."""
MEANS = ("loss", "kl", "clipped", "grad_norm")
"""Metrics that a step reports as the mean of its updates; the others are those of its first pass over the groups."""
OF_ALL_UPDATES = ("loss", "grad_norm")
"""Metrics of an update that it has also where no candidates were fed."""


@dataclass
class MicroBatch:
    """What one forward pass sees. A rank that has fewer than the others feeds a stand-in of weight 0."""

    packed: PackedBatch
    advantages: Tensor
    """float32 [C]"""
    logp_rollout: Tensor
    """float32 [C, T], 0 behind the end of a candidate."""
    candidate_weights: Tensor | float = 1.0
    """float32 [C]: factors of the candidates' contributions, 1 on average."""
    weight: float = 1.0
    """Of all of its contributions and metrics: 0 for a stand-in."""
    logp_ref: Tensor | None = None
    logp_old: Tensor | None = None


@dataclass
class MiniBatch:
    """Groups that an optimizer step is made on."""

    micro_batches: list[MicroBatch]
    """This rank's share of them."""
    count: int
    """What the sum of all their contributions is divided by."""


class PolicyUpdate:
    """The policy, its optimizer and its reference, moved by groups of rewarded candidates.

    >>> update = PolicyUpdate(engine, policy, reference, config, total_steps, staleness)
    >>> metrics = update.step(experience)            # on all ranks, each with all groups of the step
    """

    def __init__(
        self,
        engine: ZeroEngine,
        policy: Policy,
        reference: Reference | None,
        config: LearnerConfig,
        total_steps: int,
        staleness: int,
    ):
        """engine: holds `policy`. reference: None where config.beta is 0."""
        self.updates_done = 0
        """Optimizer steps so far."""
        self._engine, self._policy, self._reference = engine, policy, reference
        self._config = config
        self._objective = resolve(config.objective)
        self._total = total_steps * config.updates_per_step
        self._gets_rollout = gets_rollout(config, staleness)
        self._metric_names: set[frozenset[str]] = set()
        """That calls of the objective have returned; one set, or a mistake."""

    def step(self, experience: Experience) -> dict[str, float]:
        """config.updates_per_batch passes over the groups, with an optimizer step on each of their mini-batches;
        returns metrics that are equal on all ranks.

        All ranks have the advantages that rank 0 computes, since a run's own may be random, and take their shares of
        the groups by a plan that they agree on.
        """
        timer = PhaseTimer(self._engine.device)
        with timer("learn"):
            advantages = self._engine.of_rank_0(
                lambda: self._objective.advantages(experience.rewards, self._config.normalize_std)
            )
            with timer("pack"):
                parts = self._mini_batches(experience, advantages)
            micro_batches = [micro for part in parts for micro in part.micro_batches]
            if self._reference is not None:
                with timer("reference"), self._reference.ready() as reference:
                    for micro in micro_batches:
                        micro.logp_ref = reference(micro.packed)
            if len(parts) > 1:  # the policy moves before it sees all of them
                with timer("old"), self._frozen():
                    for micro in micro_batches:
                        micro.logp_old = self._engine(micro.packed)
            updates = [self._update(part, timer) for _ in range(self._config.updates_per_batch) for part in parts]
        seconds = timer.seconds()
        return {
            **_of_step(updates, updates[: len(parts)]),
            "groups": float(len(experience)),
            "frac_uninformative": float(1.0 - informative(advantages).mean()),
            **{f"seconds/{phase}": value for phase, value in seconds.items()},
            "tokens_per_second": sum(update["packed_tokens"] for update in updates) / seconds["learn"],
        }

    def check_rollouts(self, experience: Experience) -> None:
        """Raise MismatchError unless these groups come from the policy as it is now; nothing is updated."""
        no_advantages = [np.zeros_like(rewards) for rewards in experience.rewards]
        sums: dict[str, float] = defaultdict(float)
        with self._frozen():
            for row in range(len(experience)):
                micro = self._micro_batch(experience, no_advantages, [row], counts=True)
                for name, value in _sums(micro, self._engine(micro.packed)).items():
                    sums[name] += float(value.sum())
        check_mismatch(sums["mismatch"] / max(sums["candidates"], 1.0), self._config)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """The policy without gradients and without the dropout of adapters."""
        self._policy.eval()
        with torch.no_grad():
            yield
        self._policy.train()

    def _mini_batches(self, experience: Experience, advantages: list[np.ndarray]) -> list[MiniBatch]:
        parts = np.array_split(np.arange(len(experience)), self._config.mini_batches)
        return [
            MiniBatch(
                self._micro_batches(experience, advantages, groups),
                self._objective.count([experience.candidates[group] for group in groups]),
            )
            for groups in parts
        ]

    def _micro_batches(
        self, experience: Experience, advantages: list[np.ndarray], groups: np.ndarray
    ) -> list[MicroBatch]:
        """This rank's share of the groups of a mini-batch that can move the policy.

        groups: int [n], their rows. Every rank gets equally many micro-batches. Where there are too few, the smallest
        of these groups stands in; where no group can move the policy, the smallest of all.
        """
        only_informative = self._config.beta == 0 or self._config.kl_on == "informative"
        fed = informative(advantages)[groups] if only_informative else np.ones(len(groups), bool)
        rows = groups[fed if fed.any() else ~fed]
        sizes = self._policy.group_tokens(
            [experience.prompts[row] for row in rows], [experience.candidates[row] for row in rows]
        )
        plan = plan_micro_batches(sizes if fed.any() else [], self._config.micro_batch_tokens, self._engine.world_size)
        stand_in = [int(rows[np.argmin(sizes)])]
        return [
            self._micro_batch(experience, advantages, [int(rows[index]) for index in micro] or stand_in, bool(micro))
            for micro in plan[self._engine.rank]
        ]

    def _micro_batch(
        self, experience: Experience, advantages: list[np.ndarray], rows: list[int], counts: bool
    ) -> MicroBatch:
        packed = self._policy.pack(
            [experience.prompts[row] for row in rows], [experience.candidates[row] for row in rows]
        )
        logprobs = _padded([logprob for row in rows for logprob in experience.logprobs[row]])
        device = self._engine.device
        return MicroBatch(
            packed,
            to_device(torch.from_numpy(np.concatenate([advantages[row] for row in rows])), device),
            to_device(logprobs, device),
            self._candidate_weights(experience, rows),
            weight=float(counts),
        )

    def _candidate_weights(self, experience: Experience, rows: list[int]) -> Tensor | float:
        """Of every candidate of some groups: G times its inclusion weight, where these are to count."""
        if not self._config.inclusion_weights:
            return 1.0
        if experience.inclusion_weights is None:
            raise GroupTableError(
                f"learner.inclusion_weights=true, but the groups have no column {INCLUSION_WEIGHT!r}: roll out with "
                "rollout.strategy=stochastic_beam"
            )
        weights = [len(experience.inclusion_weights[row]) * experience.inclusion_weights[row] for row in rows]
        return to_device(torch.from_numpy(np.concatenate(weights)), self._engine.device)

    def _update(self, part: MiniBatch, timer: PhaseTimer) -> dict[str, float]:
        """One optimizer step; returns its metrics."""
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=self._engine.device))
        for index, micro in enumerate(part.micro_batches):
            with timer("forward"):
                logp = self._engine(micro.packed)
                batch = CompletionBatch(
                    logp,
                    micro.packed.mask,
                    micro.advantages,
                    logp_old=micro.logp_old,
                    logp_ref=micro.logp_ref,
                    logp_rollout=micro.logp_rollout if self._gets_rollout else None,
                )
                contributions, metrics = self._objective(batch, self._config)
                loss = (contributions * micro.candidate_weights).sum() / part.count
            with timer("backward"):
                # The engine averages over ranks; the loss is a sum over them.
                weighted = loss * (micro.weight * self._engine.world_size)
                self._engine.backward(weighted, last=index == len(part.micro_batches) - 1)
            self._metric_names.add(frozenset(metrics))
            old = logp.detach() if micro.logp_old is None else micro.logp_old
            if self._config.updates_per_step > 1:
                micro.logp_old = old
            for name, value in {**_sums(micro, old), **metrics, "loss": loss.detach()}.items():
                sums[name] += micro.weight * value.sum()  # stays on the device: nothing waits for it here
        rate = learning_rate(self._config.optimizer, self.updates_done, self._total)
        with timer("optimizer"):
            norm = self._engine.step(rate)
        self.updates_done += 1
        self._sync_reference()
        return {**self._means(sums), "grad_norm": norm, "lr": rate, "micro_batches": len(part.micro_batches)}

    def _sync_reference(self) -> None:
        every = self._config.reference_sync_every
        if self._reference is not None and every and self.updates_done % every == 0:
            self._reference.follow(self._config.reference_sync_alpha)

    def _means(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Metrics over all ranks out of this rank's sums: totals of TOTALS, else means over the fed candidates, which
        are counted.

        Raises ObjectiveError, on all ranks, where one's objective has returned other metrics than before or elsewhere.
        """
        own = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
        names, ranks = zip(*self._engine.of_all_ranks((self._metric_names, own)), strict=True)
        self._objective.check_names(set().union(*names))
        summed = {name: sum(of_rank[name] for of_rank in ranks) for name in own}
        candidates = summed.pop("candidates")
        means = {name: value if name in TOTALS else value / max(candidates, 1.0) for name, value in summed.items()}
        return {**means, "candidates": candidates}


def _of_step(updates: list[dict[str, float]], first_pass: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step out of those of its updates; the learning rate is that of the first.

    An update that was fed no candidates has no means over them.
    """

    def of_all(name: str) -> float:
        counted = updates if name in MEANS else first_pass
        if name not in OF_ALL_UPDATES:
            counted = [update for update in counted if update["candidates"]]
        values = [update[name] for update in counted]
        if name in MEANS:
            return float(np.mean(values)) if values else 0.0
        if name in TOTALS:
            return sum(values)
        return float(np.average(values, weights=[update["candidates"] for update in counted])) if values else 0.0

    names = [name for name in first_pass[0] if name not in ("candidates", "lr")]
    return {**{name: of_all(name) for name in names}, "lr": first_pass[0]["lr"]}


def _padded(rows: Sequence[np.ndarray]) -> Tensor:
    """float32 [C, T], 0 behind the end of a row."""
    lengths = np.array([len(row) for row in rows])
    padded = np.zeros((len(rows), lengths.max()), np.float32)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(padded)


def _sums(micro: MicroBatch, logp: Tensor) -> dict[str, Tensor]:
    """Sums over the candidates of a micro-batch."""
    tokens = micro.packed.mask.sum()
    return {
        "candidates": torch.tensor(len(logp)),
        "completion_tokens": tokens,
        "packed_tokens": torch.tensor(micro.packed.fed_tokens),
        "logprob": logp.sum(),
        "mismatch": (logp.sum(-1) - micro.logp_rollout.sum(-1)).abs(),
    }
