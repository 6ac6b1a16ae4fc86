"""The learner's step, tree-packed against padded: reference, forward, backward and optimizer on the same groups.

The padded side is the published way (benchmarks.published_way): a row per candidate with its prompt, logits of the
completions only, float32 master weights beside bfloat16 ones. Each side is a process of its own; steps alternate, and
both must find the same gradient, or there is no figure.

Memory above the model is the peak of a process less what it held before it loaded anything, and less what both sides
must keep: policy, reference, one gradient, the two moments and, in bfloat16, float32 master weights.
"""

import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.arithmetic import Arithmetic, packed_work
from benchmarks.harness import Row, row_of_pairs, threads, write_rows
from benchmarks.peak import matrix_peak
from benchmarks.published_way import Completions, PublishedTrainer, StepReport, advantages
from benchmarks.shapes import ON_GPU, SHAPES, ShapeAbsentError, build, measurable
from benchmarks.sides import GIB, Call, MemoryWatch, Side
from catalog.trie import Trie


@dataclass(frozen=True)
class Case:
    """What is learned from."""

    dtype: str
    workload: str | None = None
    """Of benchmarks.shapes, whose rollouts are learned from; None: synthetic groups and random weights."""
    model: str = "135m"
    """Of MODELS, where the groups are synthetic."""
    groups: int = 1
    """Synthetic ones."""
    at_once: int = 1
    """Groups of one forward pass of the padded side."""
    micro_batch_tokens: int = 1024
    """Of one forward pass of the packed side; by default a group at a time, as the padded side."""
    repeats: int = 1


MANY_GROUPS: dict[str, Any] = {"at_once": 16, "micro_batch_tokens": 65536, "repeats": 3} if ON_GPU else {}
OF_A_GPU = {
    "135m-fp32-64": Case("float32", groups=64, **MANY_GROUPS),
    "135m-bf16-64": Case("bfloat16", groups=64, **MANY_GROUPS),
    "0.5b-bf16-64": Case("bfloat16", model="0.5b", groups=64, **{**MANY_GROUPS, "at_once": 8}),
}
CASES = {
    "135m-fp32": Case("float32", repeats=3),
    "135m-bf16": Case("bfloat16", repeats=3),
    "industrial-fp32": Case("float32", "industrial-135m-fp32", **MANY_GROUPS),
    "industrial-bf16": Case("bfloat16", "industrial-135m-bf16", **({"repeats": 3} | MANY_GROUPS)),
    **(OF_A_GPU if ON_GPU else {}),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
    ),
    "0.5b": (
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
    ),
}
"""The shapes of SmolLM2-135M and Qwen2-0.5B."""
WARMUPS = 2
"""Steps of ours, beside the first pair, until its memory has grown to what it needs; theirs is steady after one."""
GROUP_SIZE = 16
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
Groups = list[dict[str, Any]]
"""{"prompt": [P], "candidates": [16][T]} of each group."""


def synthetic_groups(vocabulary: int, groups: int = 1) -> Groups:
    """Each: a prompt of 250 tokens and 16 candidates of 20, four of them each with the same first 8."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(groups):
        starts = random.integers(1, vocabulary, (4, 8))
        candidates = [[*starts[i % 4].tolist(), *random.integers(1, vocabulary, 11).tolist(), 0] for i in range(16)]
        made.append({"prompt": random.integers(1, vocabulary, 250).tolist(), "candidates": candidates})
    return made


def synthetic_model(name: str, path: Path) -> None:
    """Random weights in one of the shapes of MODELS."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model_type, shape = MODELS[name]
    config = AutoConfig.for_model(model_type, **shape, tie_word_embeddings=True, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)


class Rollout:
    """Candidates as the search finds them on real prompts."""

    def groups(self, workload_name: str) -> Groups:
        from rollout.engines import create_engine

        workload = build(SHAPES[workload_name])
        engine = create_engine(str(workload.model_path), workload.catalog.path / "trie.arrow", workload.config.rollout)
        prompts = workload.prompts(workload.step_examples(0))
        none = [0] * len(prompts)
        found = engine.generate(prompts, none, none)
        engine.shutdown()
        return [
            {"prompt": prompt, "candidates": [tokens.tolist() for tokens in group.tokens]}
            for prompt, group in zip(prompts, found, strict=True)
        ]


class Packed:
    """The project's learner."""

    def __init__(self, model_path: str, groups_file: str, dtype: str, micro_batch_tokens: int) -> None:
        from transformers import AutoModelForCausalLM

        from learner.config import LearnerConfig, OptimizerConfig
        from learner.engine import DTYPES, ZeroEngine, join_process_group
        from learner.experience import Experience
        from learner.export import named_weights
        from learner.policy import Policy
        from learner.reference import Reference
        from learner.update import PolicyUpdate
        from rollout.host_memory import return_freed_memory

        torch.set_num_threads(threads())
        self._base_gib = MemoryWatch().measure()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        device = join_process_group(0, 1, "127.0.0.1", port, 600.0)
        constant = OptimizerConfig(schedule="constant", warmup_ratio=0.0)
        config = LearnerConfig(dtype=dtype, optimizer=constant, micro_batch_tokens=micro_batch_tokens)  # type: ignore[arg-type]
        policy, frozen = (
            Policy(AutoModelForCausalLM.from_pretrained(model_path, dtype=DTYPES[dtype])) for _ in range(2)
        )
        engine = ZeroEngine(policy, config, config.optimizer)
        reference = Reference(frozen, partial(named_weights, engine, policy.lm), device, offload=False)
        self._update = PolicyUpdate(engine, policy, reference, config, total_steps=1000, staleness=0)
        groups: Groups = json.loads(Path(groups_file).read_text())
        self._experience = Experience(
            prompts=[np.asarray(group["prompt"], np.int32) for group in groups],
            candidates=[[np.asarray(row, np.int32) for row in group["candidates"]] for group in groups],
            logprobs=[[np.zeros(len(row), np.float32) for row in group["candidates"]] for group in groups],
            rewards=[np.eye(1, len(group["candidates"]), dtype=np.float32)[0] for group in groups],
        )
        packed = [
            policy.pack([prompt], [ranked])
            for prompt, ranked in zip(self._experience.prompts, self._experience.candidates, strict=True)
        ]
        forward = Arithmetic(Path(model_path)).forward(packed_work(packed))
        self._flop = 4 * forward  # reference forward, policy forward, and twice as much backward
        if device.type == "cpu":
            return_freed_memory()

    def step(self) -> dict[str, Any]:
        metrics = self._update.step(self._experience)
        return metrics | {"gradient_norm": metrics["grad_norm"], "flop": self._flop, "base_gib": self._base_gib}


class Padded:
    """The published way's learner."""

    def __init__(self, model_path: str, groups_file: str, dtype: str, at_once: int) -> None:
        torch.set_num_threads(threads())
        self._base_gib = MemoryWatch().measure()
        groups: Groups = json.loads(Path(groups_file).read_text())
        titles = list({tuple(row): None for group in groups for row in group["candidates"]})
        trie = Trie.from_titles(titles, eos_token=titles[0][-1], tokenizer_fingerprint="")
        self._trainer = PublishedTrainer(model_path, trie, dtype=dtype, gradient_checkpointing=False)
        device = self._trainer.policy.device
        batches = [groups[first : first + at_once] for first in range(0, len(groups), at_once)]
        self._batches = [_completions(batch, trie.eos_token, device) for batch in batches]

    def step(self) -> dict[str, Any]:
        report = StepReport()
        for completions in self._batches:
            advantage = advantages(torch.eye(1, GROUP_SIZE).repeat(len(completions.ids) // GROUP_SIZE, 1))
            report.loss += self._trainer.accumulate(completions, advantage, 1 / len(self._batches), report)
        with report.stage("optimizer"):
            report.gradient_norm = self._trainer.update()
        return vars(report) | {"base_gib": self._base_gib}


def _completions(groups: Groups, pad: int, device: torch.device) -> Completions:
    """Groups as `generate` returns them: a row per candidate, prompts padded on the left, candidates on the right."""
    longest = max(len(group["prompt"]) for group in groups)
    width = max(len(row) for group in groups for row in group["candidates"])
    rows, mask = [], []
    for group in groups:
        before = longest - len(group["prompt"])
        for row in group["candidates"]:
            after = width - len(row)
            rows.append([pad] * before + group["prompt"] + row + [pad] * after)
            mask.append([0] * before + [1] * (len(group["prompt"]) + len(row)) + [0] * after)
    return Completions(torch.tensor(rows, device=device), torch.tensor(mask, device=device), longest)


def measure(shape: str) -> tuple[Row, dict[str, Any]]:
    """The row of one shape, and what lies behind it.

    Raises ShapeAbsentError where the model or the data is not here, AssertionError where gradients differ.
    """
    case = CASES[shape]
    with TemporaryDirectory() as folder:
        if case.workload is None:
            model_path = Path(folder) / "model"
            synthetic_model(case.model, model_path)
            groups = synthetic_groups(MODELS[case.model][1]["vocab_size"], case.groups)
        else:
            model_path = build(SHAPES[case.workload]).model_path
            with Side("benchmarks.learner:Rollout", as_worker=True) as rollout:
                groups = rollout.call("groups", case.workload).result
        groups_file = Path(folder) / "groups.json"
        groups_file.write_text(json.dumps(groups))
        arguments = (str(model_path), str(groups_file), case.dtype)
        with (
            Side("benchmarks.learner:Packed", *arguments, case.micro_batch_tokens, as_worker=True) as ours,
            Side("benchmarks.learner:Padded", *arguments, case.at_once) as theirs,
        ):
            calls = [(ours.call("step"), theirs.call("step"))]
            for _ in range(WARMUPS):
                ours.call("step")
            for _ in range(case.repeats):
                calls.append((ours.call("step"), theirs.call("step")))
                print(f"{shape}: packed {calls[-1][0].seconds:.3g} s, padded {calls[-1][1].seconds:.3g} s", flush=True)
        kept_gib = _kept_gib(model_path, case.dtype)
    check_equal(*calls[0], GRADIENT_TOLERANCE[case.dtype])
    pairs = [(mine.seconds, published.seconds) for mine, published in calls[1:]]
    return _described(row_of_pairs("padded", shape, pairs), case.dtype, calls, kept_gib)


def check_equal(ours: Call, theirs: Call, tolerance: float) -> None:
    """Raise AssertionError unless both sides made the same step."""
    mine, published = ours.result["gradient_norm"], theirs.result["gradient_norm"]
    if abs(mine - published) > tolerance * published:
        raise AssertionError(f"gradient norms differ: packed {mine}, padded {published}")


def _described(
    row: Row, dtype: str, calls: Sequence[tuple[Call, Call]], kept_gib: float
) -> tuple[Row, dict[str, Any]]:
    """The row with its memory above the model, and its details."""
    mine, published = calls[-1]
    above = [call.peak_gib - call.result["base_gib"] - kept_gib for call in (mine, published)]
    peak = matrix_peak(dtype)
    result = mine.result
    details = {
        "shape": row.shape,
        "seconds_per_1000_packed_tokens": row.ours_s * 1000 / result["packed_tokens"],
        "share_of_matrix_peak": result["flop"] / row.ours_s / peak,
        "matrix_peak_gflops": peak / 1e9,
        "memory_above_model_ratio": above[0] / above[1],
        "memory_kept_gib": kept_gib,
        "packed_tokens": result["packed_tokens"],
        "ours_stages": {name: value for name, value in result.items() if name.startswith("seconds/")},
        "theirs_stages": published.result["seconds"],
        "gradient_norms": [call.result["gradient_norm"] for call in calls[0]],
    }
    note = (
        f"{details['seconds_per_1000_packed_tokens']:.2g} s per 1,000 packed tokens, "
        f"{details['share_of_matrix_peak']:.0%} of the matrix peak, "
        f"memory above the model {details['memory_above_model_ratio']:.0%} of theirs"
    )
    return replace(row, ours_gib=above[0], theirs_gib=above[1], note=note), details


def _kept_gib(model_path: Path, dtype: str) -> float:
    """Policy, reference, gradient, moments, master weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters * (3 * 2 + 8 + 4 if dtype == "bfloat16" else 3 * 4 + 8) / GIB


def main(*shapes: str) -> None:
    rows, details = [], []
    shapes, left_out = (shapes, "") if shapes else measurable(CASES)
    for shape in shapes:
        try:
            row, detail = measure(shape)
        except ShapeAbsentError as absent:
            print(f"{shape}: skipped, {absent}", flush=True)
            continue
        rows.append(row)
        details.append(detail)
        print(f"{shape}: {row.ratio:.1f}x, {row.note}", flush=True)
    title = "Learner step, tree-packed against padded (memory above the model)"
    write_rows(rows, title, {"learner": details}, left_out)


if __name__ == "__main__":
    main(*sys.argv[1:])
