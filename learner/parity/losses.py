"""Log-probabilities, losses and gradients against the published code's."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from learner.config import LearnerConfig
from learner.objectives import CompletionBatch, resolve
from learner.packing import PackedBatch
from learner.parity.comparison import Comparison, difference
from learner.parity.golden import GoldenSet
from learner.policy import Policy

Values = dict[str, list[Any]]
"""What one objective gave on every batch and beta, by quantity."""


@dataclass(frozen=True)
class _Batch:
    packed: PackedBatch
    groups: list[list[list[int]]]
    advantages: torch.Tensor
    logp_ref: torch.Tensor


def compare_losses(golden: GoldenSet) -> Iterator[Comparison]:
    """loss.json: every objective and beta on fixed batches, with the gradient of every parameter.

    The golden values are of single micro-batches, where the published normalisation and ours agree.
    """
    with golden.reading("loss.json"):
        record = golden.json("loss.json")
        reference, policy = Policy(golden.load_model()), Policy(golden.load_model())
        policy.lm.load_state_dict(golden.tensors("loss_policy.safetensors"), strict=False)
        batches = []
        for index, entry in enumerate(record["batches"]):
            tensors = golden.tensors(entry["file"])
            batch = _batch(tensors, policy, reference)
            batches.append(batch)
            with torch.no_grad():
                logps = {"per_token_logps": policy(batch.packed), "ref_per_token_logps": batch.logp_ref}
            for name, logp in logps.items():
                expected = tensors[name].masked_fill(~tensors["completion_mask"].bool(), 0.0)
                yield difference(f"batch {index}: {name}", logp, expected[:, : logp.shape[1]], 1e-4)

        found: dict[str, Values] = defaultdict(lambda: defaultdict(list))
        published: dict[str, Values] = defaultdict(lambda: defaultdict(list))
        for result in record["results"]:
            for name, value in _compute(result, batches[result["batch"]], policy).items():
                found[result["loss_type"]][name].append(value)
            for name, value in _published(result).items():
                published[result["loss_type"]][name].append(value)
        for objective in found:
            yield from _compare(objective, found[objective], published[objective])


def _compare(objective: str, found: Values, published: Values) -> Iterator[Comparison]:
    """Gradients of parameters are compared relative to their own L2 norm, sums of their elements too."""
    norms = np.asarray(published["gradient L2"])
    scales: dict[str, Any] = {"loss": 1.0, "gradient L2": norms, "gradient sum": norms}
    tolerances = {"loss": 1e-6, "gradient sum": 1e-4}
    for name, golden in published.items():
        scale = scales.get(name, golden)
        yield difference(f"{objective}: {name}", found[name], golden, tolerances.get(name, 1e-5), scale)


def _published(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "loss": result["loss"],
        "KL": result["mean_kl"],
        "gradient norm": result["grad_norm"],
        "gradient L2": [norm for _, norm in result["grads"].values()],
        "gradient sum": [total for total, _ in result["grads"].values()],
    }


def _compute(result: dict[str, Any], batch: _Batch, policy: Policy) -> dict[str, Any]:
    objective = resolve(result["loss_type"])
    policy.zero_grad()
    completions = CompletionBatch(policy(batch.packed), batch.packed.mask, batch.advantages, logp_ref=batch.logp_ref)
    contributions, metrics = objective(completions, LearnerConfig(beta=result["beta"]))
    loss = contributions.sum() / objective.count(batch.groups)
    loss.backward()
    parameters = dict(policy.lm.named_parameters())
    gradients = [parameters[name].grad.double() for name in result["grads"]]  # type: ignore[union-attr]
    norms = [gradient.norm().item() for gradient in gradients]
    return {
        "loss": loss.item(),
        "KL": metrics["kl"].mean().item(),
        "gradient norm": float(np.linalg.norm(norms)),
        "gradient L2": norms,
        "gradient sum": [gradient.sum().item() for gradient in gradients],
    }


def _batch(tensors: dict[str, torch.Tensor], policy: Policy, reference: Policy) -> _Batch:
    rows = zip(
        _unpadded(tensors["prompt_ids"], tensors["prompt_mask"]),
        _unpadded(tensors["completion_ids"], tensors["completion_mask"]),
        strict=True,
    )
    by_prompt = [(prompt, [row[1] for row in same]) for prompt, same in groupby(rows, key=lambda row: row[0])]
    groups = [candidates for _, candidates in by_prompt]
    packed = policy.pack([prompt for prompt, _ in by_prompt], groups)
    with torch.no_grad():
        return _Batch(packed, groups, tensors["advantages"], reference(packed))


def _unpadded(tokens: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[kept.bool()].tolist() for row, kept in zip(tokens, mask, strict=True)]
