"""Objectives against their formulas written out, and the sum over micro-batches against the unsplit loss."""

import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.config import LearnerConfig, objective_names
from learner.objectives import CompletionBatch, Objective, ObjectiveError, check_objective, objective, resolve

LENGTHS = (3, 5, 1, 4, 2, 5)


def completions(seed: int = 0, off_policy: bool = False) -> CompletionBatch:
    random = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]

    def draw() -> torch.Tensor:
        return (-torch.rand(mask.shape, generator=random)).masked_fill(~mask, 0.0)

    return CompletionBatch(
        logp=draw().requires_grad_(),
        mask=mask,
        advantages=torch.randn(len(LENGTHS), generator=random),
        logp_ref=draw(),
        logp_old=draw() if off_policy else None,
        logp_rollout=draw() if off_policy else None,
    )


def rows(batch: CompletionBatch, chosen: slice) -> CompletionBatch:
    fields = {name: value for name, value in vars(batch).items() if value is not None}
    return CompletionBatch(**{name: value[chosen] for name, value in fields.items()})


def tokens_of(batch: CompletionBatch) -> list[list[list[int]]]:
    return [[[0] * length for length in batch.mask.sum(1).tolist()]]


def written_out(name: str, batch: CompletionBatch, config: LearnerConfig) -> torch.Tensor:
    """The loss, one completion and one token at a time."""
    losses = []
    behaviour = batch.logp_old if batch.logp_rollout is None else batch.logp_rollout
    for row, length in enumerate(LENGTHS):
        lp, ref, old, roll = (
            values[row, :length]
            for values in (batch.logp, batch.logp_ref, batch.logp_old, behaviour)  # type: ignore[index]
        )
        advantage = batch.advantages[row]
        kl = torch.exp(ref - lp) - (ref - lp) - 1
        low, high = 1 - config.clip_low, 1 + config.clip_high  # type: ignore[operator]

        def clipped(ratio: torch.Tensor, advantage: torch.Tensor = advantage) -> torch.Tensor:
            return torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)  # noqa: B023

        if name in ("grpo", "dapo"):
            gain = clipped(torch.exp(lp - old)) * torch.exp(old - roll).clamp(max=config.importance_cap)
            per_token = config.beta * kl - gain
            losses.append(per_token.mean() if name == "grpo" else per_token.sum())
        elif name in ("gspo", "rank_grpo"):
            gain = clipped(torch.exp((lp - old).mean())) * torch.exp((old - roll).mean()).clamp(
                max=config.importance_cap
            )
            losses.append(config.beta * kl.mean() - gain)
        else:
            weight = torch.exp((lp - roll).sum()).clamp(max=config.importance_cap).detach()
            losses.append(config.beta * kl.sum() - weight * advantage * lp.sum())
    return torch.stack(losses).sum() / (sum(LENGTHS) if name == "dapo" else len(LENGTHS))


def metric_written_out(key: str, name: str, batch: CompletionBatch, config: LearnerConfig) -> torch.Tensor:
    """The mean KL of each completion, or the share of its ratios that leave the bounds on the clipped side."""
    values = []
    for row, length in enumerate(LENGTHS):
        lp, ref, old = (v[row, :length].detach() for v in (batch.logp, batch.logp_ref, batch.logp_old))  # type: ignore[union-attr]
        ratio = torch.exp((lp - old) if name in ("grpo", "dapo") else (lp - old).mean())
        beyond = ratio > 1 + config.clip_high if batch.advantages[row] > 0 else ratio < 1 - config.clip_low  # type: ignore[operator]
        kl = torch.exp(ref - lp) - (ref - lp) - 1
        values.append(kl.mean() if key == "kl" else beyond.float().mean())
    return torch.stack(values)


@pytest.mark.parametrize("name", objective_names())
@pytest.mark.parametrize("behaviour", ["of the rollout", "the old policy"])
def test_objectives_equal_their_formulas(name: str, behaviour: str) -> None:
    config = LearnerConfig(beta=0.1, clip_low=0.2, clip_high=0.3, importance_cap=1.2)
    batch = completions(off_policy=True)
    if behaviour == "the old policy":
        batch = replace(batch, logp_rollout=None)
    contributions, metrics = resolve(name)(batch, config)
    loss = contributions.sum() / resolve(name).count(tokens_of(batch))
    expected = written_out(name, batch, config)
    torch.testing.assert_close(loss, expected)
    gradient, expected_gradient = (torch.autograd.grad(value, batch.logp)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient)
    for key, values in metrics.items():
        torch.testing.assert_close(values, metric_written_out(key, name, batch, config))


@pytest.mark.parametrize("name", objective_names())
@pytest.mark.parametrize("off_policy", [False, True])
def test_micro_batches_add_up_to_the_unsplit_loss(name: str, off_policy: bool) -> None:
    config = LearnerConfig(beta=0.1, clip_low=0.2, clip_high=0.2)
    batch = completions(1, off_policy)
    chosen = resolve(name)
    count = chosen.count(tokens_of(batch))
    whole = chosen(batch, config)[0].sum() / count
    parts = sum(chosen(rows(batch, part), config)[0].sum() / count for part in (slice(0, 1), slice(1, 4), slice(4, 6)))
    torch.testing.assert_close(parts, whole)
    gradients = [torch.autograd.grad(value, batch.logp, retain_graph=True)[0] for value in (parts, whole)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", objective_names())
def test_padding_has_no_influence(name: str) -> None:
    config = LearnerConfig(beta=0.1)
    batch = completions(2, off_policy=True)
    noisy = {
        key: torch.where(batch.mask, value, 7.0) if value is not None and value.dim() == 2 else value
        for key, value in vars(batch).items()
    } | {"mask": batch.mask}
    torch.testing.assert_close(resolve(name)(CompletionBatch(**noisy), config)[0], resolve(name)(batch, config)[0])


def test_on_policy_the_gradients_of_grpo_and_gspo_agree() -> None:
    config = LearnerConfig(beta=0.0)
    batch = completions(3)
    gradients = [
        torch.autograd.grad(resolve(name)(batch, config)[0].sum(), batch.logp)[0] for name in ("grpo", "gspo")
    ]
    torch.testing.assert_close(*gradients)
    expected = -batch.advantages[:, None] * batch.mask / batch.mask.sum(1, keepdim=True)
    torch.testing.assert_close(gradients[0], expected)


@pytest.mark.parametrize(
    ("low", "high", "bound"), [(0.2, None, [0, 0, 0, 1]), (None, 0.4, [1, 0, 0, 0]), (None, None, [0] * 4)]
)
def test_a_bound_that_is_not_set_does_not_clip(low: float | None, high: float | None, bound: list[int]) -> None:
    logp = torch.log(torch.tensor([[1.5], [0.5], [1.5], [0.5]])).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    batch = CompletionBatch(logp, torch.ones(4, 1, dtype=torch.bool), advantages, logp_old=torch.zeros(4, 1))
    contributions, metrics = resolve("grpo")(batch, LearnerConfig(beta=0.0, clip_low=low, clip_high=high))
    contributions.sum().backward()
    assert (logp.grad == 0).flatten().tolist() == [bool(binds) for binds in bound]
    assert metrics["clipped"].tolist() == bound


def test_clipping_stops_the_gradient_on_the_side_it_bounds_only() -> None:
    mask = torch.ones(4, 1, dtype=torch.bool)
    logp = torch.log(torch.tensor([[1.5], [0.5], [1.5], [0.5]])).requires_grad_()
    batch = CompletionBatch(logp, mask, torch.tensor([1.0, 1.0, -1.0, -1.0]), logp_old=torch.zeros(4, 1))
    contributions, metrics = resolve("grpo")(batch, LearnerConfig(beta=0.0, clip_low=0.2, clip_high=0.4))
    contributions.sum().backward()
    assert (logp.grad != 0).flatten().tolist() == [False, True, True, False]
    assert metrics["clipped"].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_names_are_the_files_of_the_folder() -> None:
    assert objective_names() == ["dapo", "grpo", "gspo", "rank_grpo", "reinforce"]


def test_an_objective_of_another_package_is_found_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    @objective(mean_over="completions")
    def likelihood(batch: CompletionBatch, config: LearnerConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -batch.token_sum(batch.logp), {}

    module = types.ModuleType("somebody_else")
    module.likelihood = likelihood  # type: ignore[attr-defined]
    module.undeclared = lambda batch, config: batch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebody_else", module)
    assert resolve("somebody_else:likelihood").count([[[1], [1]], [[1]]]) == 3
    with pytest.raises(ObjectiveError, match="declare it with"):
        resolve("somebody_else:undeclared")
    with pytest.raises(ObjectiveError, match=r"has no 'missing'; it has likelihood$"):
        resolve("somebody_else:missing")
    with pytest.raises(ObjectiveError, match="'nobody_else:likelihood': there is no module 'nobody_else'"):
        resolve("nobody_else:likelihood")


def test_an_objective_is_found_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "here")])
    (tmp_path / "here").mkdir()
    (tmp_path / "mine.py").write_text(
        "from learner.objectives import objective\n"
        "@objective(mean_over='tokens')\n"
        "def likelihood(batch, config):\n    return -batch.token_sum(batch.logp), {}\n"
    )
    found = resolve(f"{tmp_path}/mine.py:likelihood")
    assert found.normaliser == "tokens"
    assert resolve("../mine.py:likelihood") is found
    with pytest.raises(ObjectiveError, match=r"there is no file .*\.\./yours\.py"):
        resolve("../yours.py:likelihood")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:\n", r"broken\.py\", line 1\n +def f\(:"),
        ("import no_such_package\n", r"broken\.py\", line 1, in <module>"),
    ],
)
def test_an_objective_file_that_does_not_run_is_shown_at_its_line(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(ObjectiveError, match=message) as caught:
        resolve(f"{tmp_path}/broken.py:f")
    assert "importlib" not in str(caught.value)
    assert "own_code" not in str(caught.value)


def test_a_mean_over_something_else_is_refused() -> None:
    with pytest.raises(ObjectiveError, match=r"mean_over='sequences'.*completions or tokens"):
        objective(mean_over="sequences")  # type: ignore[arg-type]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ObjectiveError, match=r"no objective 'ppo'; known are .*'grpo'"):
        resolve("ppo")


def test_advantages_belong_to_the_objective() -> None:
    rewards = [np.array([1.0, 0.0, 0.0])]
    np.testing.assert_allclose(resolve("reinforce").advantages(rewards, True)[0], [1.0, -0.5, -0.5])
    assert not resolve("rank_grpo").advantages(rewards, True)[0].any()  # no other list to compare with


@pytest.mark.parametrize(
    ("contributions", "message"),
    [
        (lambda batch, config: (batch.token_sum(batch.logp * 0).sqrt(), {}), "gradient are not finite"),
        (lambda batch, config: (batch.token_sum(batch.logp) + torch.inf, {}), "are not finite"),
        (lambda batch, config: (batch.token_sum(batch.logp), {}, {}), r"must return \(contributions, metrics\)"),
        (lambda batch, config: (batch.token_sum(batch.logp), []), r"must return \(contributions, metrics\)"),
        (
            lambda batch, config: (
                batch.token_sum(batch.logp),
                dict.fromkeys(("mismatch", "mine", "seconds/mine", "step"), batch.advantages),
            ),
            r"\['mismatch', 'seconds/mine', 'step'\], which a run logs itself",
        ),
    ],
)
def test_an_objective_that_could_not_train_is_refused(contributions: Callable[..., Any], message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        check_objective(objective(mean_over="completions")(contributions), LearnerConfig(), staleness=0)


def with_advantages(advantages: Callable[..., Any]) -> Objective:
    """An objective that differs from others in its advantages only."""
    return objective(mean_over="completions", advantages=advantages)(
        lambda batch, config: (-batch.token_sum(batch.logp) * batch.advantages, {})
    )


@pytest.mark.parametrize(
    ("advantages", "message"),
    [
        (lambda rewards, std: rewards[:1], "are of 1 groups where the rewards are of 3"),
        (lambda rewards, std: [r[1:] for r in rewards], r"group 0 with the rewards \[1\.0, .*\] they are \[0\.0, "),
        (lambda rewards, std: [r.mean() for r in rewards], r"one finite number per candidate; of group 0"),
        (lambda rewards, std: [(r - r.mean()) / r.std() for r in rewards], r"of group 1 .*\[nan, nan, nan\]"),
        (lambda rewards, std: [r.astype(float) * 1e300 for r in rewards], r"they are \[inf, "),
        (lambda rewards, std: np.stack(rewards), r"advantages of .* raised:\n(.*\n)*.*all input arrays must have"),
        (lambda rewards: rewards, "takes 1 positional argument but 2 were given"),
        (lambda rewards, std: None, "'NoneType' object is not iterable"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_advantages_that_could_not_train_are_refused(advantages: Callable[..., Any], message: str) -> None:
    with pytest.raises(ObjectiveError, match=message) as caught:
        check_objective(with_advantages(advantages), LearnerConfig(), staleness=0)
    assert f"advantages of {__name__}:<lambda>" in str(caught.value)


def test_advantages_may_change_the_rewards_they_get_and_are_float32() -> None:
    def centred(rewards: Sequence[np.ndarray], normalize_std: bool) -> list[np.ndarray]:
        for group in rewards:
            group -= group.mean()
        return [group.astype(np.float64) for group in rewards]

    rewards = [np.array([1.0, 0.0], np.float32), np.array([2.0, 0.0, 1.0], np.float32)]
    for group in rewards:
        group.flags.writeable = False  # as the views into a step's tables are
    found = with_advantages(centred).advantages(rewards, True)
    assert [group.tolist() for group in found] == [[0.5, -0.5], [1.0, -1.0, 0.0]]
    assert {group.dtype for group in found} == {np.dtype(np.float32)}
    assert rewards[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("config", "staleness", "given"),
    [
        ({"beta": 0.0}, 0, [set()]),
        ({}, 0, [{"ref"}]),
        ({}, 1, [{"ref", "rollout"}]),
        ({"importance_sampling": "always"}, 0, [{"ref", "rollout"}]),
        ({"updates_per_batch": 4}, 0, [{"ref"}, {"ref", "old"}]),
        ({"mini_batches": 2}, 0, [{"ref"}, {"ref", "old"}]),
        ({"updates_per_batch": 2, "beta": 0.0}, 1, [{"rollout"}, {"old", "rollout"}]),
    ],
)
def test_an_objective_is_tried_with_what_a_run_will_give_it(
    config: dict[str, Any], staleness: int, given: list[set[str]]
) -> None:
    seen = []

    @objective(mean_over="completions")
    def noting(batch: CompletionBatch, config: LearnerConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        seen.append({name for name in ("old", "ref", "rollout") if getattr(batch, f"logp_{name}") is not None})
        return batch.token_sum(batch.logp), {}

    check_objective(noting, LearnerConfig(**config), staleness)
    assert seen == given


@pytest.mark.parametrize("name", objective_names())
@pytest.mark.parametrize("staleness", [0, 1])
def test_our_own_pass_what_others_are_tried_with(name: str, staleness: int) -> None:
    check_objective(resolve(name), LearnerConfig(updates_per_batch=2), staleness)


def test_what_fails_from_the_second_update_on_is_said_beforehand() -> None:
    @objective(mean_over="completions")
    def misspelt(batch: CompletionBatch, config: LearnerConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ratio = 1.0 if batch.logp_old is None else (batch.logp - batch.logp_odl).exp()  # type: ignore[attr-defined]
        return -batch.token_mean(batch.logp * ratio), {}

    check_objective(misspelt, LearnerConfig(), staleness=0)
    with pytest.raises(ObjectiveError, match="no attribute 'logp_odl'"):
        check_objective(misspelt, LearnerConfig(updates_per_batch=2), staleness=0)


def test_metrics_of_later_updates_only_are_refused_beforehand() -> None:
    @objective(mean_over="completions")
    def late(batch: CompletionBatch, config: LearnerConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        metrics = {} if batch.logp_old is None else {"moved": batch.token_mean(batch.logp_old)}
        return -batch.token_mean(batch.logp), {"entropy": batch.advantages, **metrics}

    check_objective(late, LearnerConfig(), staleness=0)
    with pytest.raises(
        ObjectiveError, match=r"objective .*late returned the metrics \['moved'\] in some calls and not"
    ):
        check_objective(late, LearnerConfig(updates_per_batch=2), staleness=0)
