"""Whole training runs against the published code's: search, rewards, update and weight transfer, step by step."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from learner.config import LearnerConfig, OptimizerConfig
from learner.engine import ZeroEngine
from learner.experience import Experience
from learner.export import named_weights, weight_buckets
from learner.parity.comparison import Comparison, difference, unequal
from learner.parity.golden import GoldenSet
from learner.parity.rewards import SETTINGS, group_rewards
from learner.policy import Policy
from learner.reference import Reference
from learner.update import PolicyUpdate
from rollout.engine import RolloutEngine
from rollout.groups import Candidates, group_table

WEIGHTS_TOLERANCE = 1e-3
"""L2 error of the final weights in units of the L2 update: Adam amplifies rounding where gradients are nearly zero."""


class Replay:
    """One run from the golden model's weights, with the recorded prompts and our own everything else.

    >>> with replaying(golden, config, engine) as replay:
    ...     for step in steps: found = replay.step(example_ids, prompts)
    """

    def __init__(self, golden: GoldenSet, config: dict[str, Any], engine: RolloutEngine) -> None:
        """config: that of the golden run."""
        self._golden, self._engine = golden, engine
        self._terms = SETTINGS[config["reward_type"]]
        ours = learner_config(config)
        self.policy = Policy(golden.load_model().train(), logit_mib=ours.logit_mib)
        self.zero = ZeroEngine(self.policy, ours, ours.optimizer)
        self.reference = Policy(golden.load_model(), logit_mib=ours.logit_mib)
        source = partial(named_weights, self.zero, self.policy.lm)
        frozen = Reference(self.reference, source, self.zero.device, offload=False)
        self._update = PolicyUpdate(self.zero, self.policy, frozen, ours, config["max_steps"], staleness=0)

    def step(self, example_ids: list[int], prompts: list[list[int]]) -> tuple[list[Candidates], dict[str, Any]]:
        """Hand the weights over, search, reward, update; returns the candidates and the step's metrics."""
        self._engine.load_weights(weight_buckets(self.zero, self.policy.lm))
        targets = [self._golden.target_class[example] for example in example_ids]
        groups = self._engine.generate(prompts, [0] * len(prompts), targets)
        terms = group_rewards([group.item_class.tolist() for group in groups], targets)
        rewards = np.sum([terms[name] for name in self._terms], axis=0)
        table = group_table(example_ids, self._update.updates_done, prompts, targets, groups)
        table = table.append_column("reward", pa.array(list(rewards), pa.list_(pa.float32())))
        metrics = self._update.step(Experience.from_tables([table]))
        return groups, {**metrics, "rewards": rewards}


@contextmanager
def replaying(golden: GoldenSet, config: dict[str, Any], engine: RolloutEngine) -> Iterator[Replay]:
    """A Replay whose optimizer is freed at the end."""
    replay = Replay(golden, config, engine)
    try:
        yield replay
    finally:
        replay.zero.destroy()


def learner_config(config: dict[str, Any]) -> LearnerConfig:
    """Our configuration of a golden run's."""
    return LearnerConfig(
        objective="dapo" if config["dapo"] else "gspo" if config["gspo"] else "grpo",
        beta=config["beta"],
        reference_sync_every=config["ref_model_sync_steps"] if config["sync_ref_model"] else 0,
        reference_sync_alpha=config["ref_model_mixup_alpha"],
        optimizer=OptimizerConfig(
            learning_rate=config["learning_rate"],
            schedule=config["lr_scheduler_type"],
            warmup_ratio=config["warmup_ratio"],
            betas=tuple(config["betas"]),
            eps=config["eps"],
            weight_decay=config["weight_decay_per_group"][0],
            gradient_clipping=config["max_grad_norm"],
        ),
    )


def compare_trajectory(golden: GoldenSet, name: str, engine: RolloutEngine) -> Iterator[Comparison]:
    """trajectory/<name>: candidates, rewards, loss, KL, gradient norm and learning rate of every step, then weights.

    The micro-batches of a published step draw their candidates from the same weights, so here a step is one batch.
    That is the same loss for grpo and gspo; published dapo divides by each micro-batch's tokens, ours by the step's.
    """
    file = f"trajectory/{name}.json"
    with golden.reading(file):
        record = golden.json(file)
        found: dict[str, list[Any]] = defaultdict(list)
        published: dict[str, list[Any]] = defaultdict(list)
        with replaying(golden, record["config"], engine) as replay:
            for step in record["steps"]:
                recorded = _recorded(step)
                groups, metrics = replay.step(recorded["example_ids"], recorded["prompts"])
                found["prompts"] += [golden.prompts[example] for example in recorded["example_ids"]]
                found["candidates"] += [tokens for group in groups for tokens in group.tokens]
                found["scores"] += [score for group in groups for score in group.score]
                found["rewards"] += list(metrics["rewards"].ravel())
                for metric in ("loss", "kl", "grad_norm", "lr"):
                    found[metric].append(metrics[metric])
                for key, value in recorded.items():
                    published[key] += value
            yield from _compare_steps(name, found, published)
            yield _compare_weights(golden, f"{name}: final weights", f"{name}_final", replay.policy)
            if record["config"]["sync_ref_model"]:
                yield _compare_weights(golden, f"{name}: final reference", f"{name}_final_ref", replay.reference)


def _recorded(step: dict[str, Any]) -> dict[str, list[Any]]:
    micros = step["micro_batches"]
    joined = {
        ours: [value for micro in micros for value in micro[theirs]]
        for ours, theirs in (
            ("example_ids", "example_ids"),
            ("prompts", "prompt_ids"),
            ("candidates", "completion_ids"),
            ("scores", "beam_scores"),
            ("rewards", "rewards"),
        )
    }
    return {
        **joined,
        "loss": [step["loss_mean_over_micro"]],
        "kl": [float(np.mean([micro["kl"] for micro in micros]))],
        "grad_norm": [step["grad_norm_before_clip"]],
        "lr": [step["lr_used"]],
    }


def _compare_steps(name: str, found: dict[str, list[Any]], published: dict[str, list[Any]]) -> Iterator[Comparison]:
    """KL and gradient norm are compared relative to 1 or themselves, whichever is larger."""
    for key in ("prompts", "candidates"):
        yield unequal(f"{name}: {key}", found[key], published[key])
    tolerances = {"scores": 1e-2, "rewards": 1e-6, "loss": 1e-5, "kl": 1e-3, "grad_norm": 1e-3, "lr": 1e-9}
    for key, tolerance in tolerances.items():
        scale = np.maximum(np.abs(published[key]), 1.0) if key in ("kl", "grad_norm") else 1.0
        yield difference(f"{name}: {key}", found[key], published[key], tolerance, scale)


def _compare_weights(golden: GoldenSet, title: str, file: str, policy: Policy) -> Comparison:
    """L2 error in units of the L2 distance that the golden run moved."""
    final = golden.tensors(f"trajectory/{file}.safetensors")
    start = golden.tensors("model/model.safetensors")
    weights = dict(policy.lm.named_parameters())
    errors = torch.stack([(weights[name].detach() - weight).norm() for name, weight in final.items()])
    moved = torch.stack([(start[name] - weight).norm() for name, weight in final.items()]).norm()
    count = sum(weight.numel() for weight in final.values())
    return Comparison(f"{title}, L2 error / L2 update", float(errors.norm() / moved), WEIGHTS_TOLERANCE, count)
