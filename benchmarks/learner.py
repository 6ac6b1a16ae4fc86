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
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.harness import GIB, Call, MemoryWatch, Row, Side, row_of_pairs, threads, write_rows
from benchmarks.limits import Arithmetic
from benchmarks.peak import matrix_peak
from benchmarks.published_way import Completions, PublishedTrainer, StepReport, advantages
from benchmarks.shapes import SHAPES, ShapeAbsentError, build, measurable
from catalog.trie import Trie

CASES = {
    "135m-fp32": (None, "float32"),
    "135m-bf16": (None, "bfloat16"),
    "industrial-fp32": ("industrial-135m-fp32", "float32"),
    "industrial-bf16": ("industrial-135m-bf16", "bfloat16"),
}
"""shape: (workload of benchmarks.shapes that is rolled out, or None for the synthetic group; precision)"""
REPEATS = {"135m-fp32": 3, "135m-bf16": 3, "industrial-fp32": 1, "industrial-bf16": 1}
WARMUPS = 2
"""Steps of ours, beside the first pair, until its memory has grown to what it needs; theirs is steady after one."""
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
Groups = list[dict[str, Any]]
"""{"prompt": [P], "candidates": [16][T]} of each group."""


def synthetic_groups(vocabulary: int) -> Groups:
    """One group: a prompt of 250 tokens and 16 candidates of 20, four of them each with the same first 8."""
    random = np.random.default_rng(0)
    starts = random.integers(1, vocabulary, (4, 8))
    candidates = [[*starts[i % 4].tolist(), *random.integers(1, vocabulary, 11).tolist(), 0] for i in range(16)]
    return [{"prompt": random.integers(1, vocabulary, 250).tolist(), "candidates": candidates}]


def synthetic_model(path: Path) -> None:
    """Random weights in the shape of SmolLM2-135M."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)


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

    def __init__(self, model_path: str, groups_file: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        from learner.config import LearnerConfig, OptimizerConfig
        from learner.engine import DTYPES, ZeroEngine, join_process_group
        from learner.experience import Experience
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
        # a group at a time, as the padded side
        config = LearnerConfig(dtype=dtype, optimizer=constant, micro_batch_tokens=1024)  # type: ignore[arg-type]
        policy, frozen = (
            Policy(AutoModelForCausalLM.from_pretrained(model_path, dtype=DTYPES[dtype])) for _ in range(2)
        )
        engine = ZeroEngine(policy, config, config.optimizer)
        reference = Reference(frozen, device, offload=False)
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
        forward = Arithmetic(Path(model_path)).forward(
            sum(batch.fed_tokens for batch in packed),
            sum(int(batch.positions.sum()) + batch.fed_tokens for batch in packed),
            sum(len(batch.rows) for batch in packed),
        )
        self._flop = 4 * forward  # reference forward, policy forward, and twice as much backward
        if device.type == "cpu":
            return_freed_memory()

    def step(self) -> dict[str, Any]:
        metrics = self._update.step(self._experience)
        return metrics | {"gradient_norm": metrics["grad_norm"], "flop": self._flop, "base_gib": self._base_gib}


class Padded:
    """The published way's learner."""

    def __init__(self, model_path: str, groups_file: str, dtype: str) -> None:
        torch.set_num_threads(threads())
        self._base_gib = MemoryWatch().measure()
        groups: Groups = json.loads(Path(groups_file).read_text())
        titles = list({tuple(row): None for group in groups for row in group["candidates"]})
        trie = Trie.from_titles(titles, eos_token=titles[0][-1], tokenizer_fingerprint="")
        self._trainer = PublishedTrainer(model_path, trie, dtype=dtype, gradient_checkpointing=False)
        self._batches = [_completions(group, trie.eos_token) for group in groups]

    def step(self) -> dict[str, Any]:
        report = StepReport()
        for completions in self._batches:
            advantage = advantages(torch.eye(1, len(completions.ids)))
            report.loss += self._trainer.accumulate(completions, advantage, 1 / len(self._batches), report)
        with report.stage("optimizer"):
            report.gradient_norm = self._trainer.update()
        return vars(report) | {"base_gib": self._base_gib}


def _completions(group: dict[str, Any], pad: int) -> Completions:
    """A group as `generate` returns it: one row per candidate, padded on the right."""
    width = max(map(len, group["candidates"]))
    rows = [[*group["prompt"], *row, *[pad] * (width - len(row))] for row in group["candidates"]]
    mask = [[1] * (len(group["prompt"]) + len(row)) + [0] * (width - len(row)) for row in group["candidates"]]
    return Completions(torch.tensor(rows), torch.tensor(mask), len(group["prompt"]))


def measure(shape: str) -> tuple[Row, dict[str, Any]]:
    """The row of one shape, and what lies behind it.

    Raises ShapeAbsentError where the model or the data is not here, AssertionError where gradients differ.
    """
    workload_name, dtype = CASES[shape]
    with TemporaryDirectory() as folder:
        if workload_name is None:
            model_path = Path(folder) / "model"
            synthetic_model(model_path)
            groups = synthetic_groups(49152)
        else:
            model_path = build(SHAPES[workload_name]).model_path
            with Side("benchmarks.learner:Rollout", as_worker=True) as rollout:
                groups = rollout.call("groups", workload_name).result
        groups_file = Path(folder) / "groups.json"
        groups_file.write_text(json.dumps(groups))
        arguments = (str(model_path), str(groups_file), dtype)
        with (
            Side("benchmarks.learner:Packed", *arguments, as_worker=True) as ours,
            Side("benchmarks.learner:Padded", *arguments) as theirs,
        ):
            calls = [(ours.call("step"), theirs.call("step"))]
            for _ in range(WARMUPS):
                ours.call("step")
            for _ in range(REPEATS[shape]):
                calls.append((ours.call("step"), theirs.call("step")))
                print(f"{shape}: packed {calls[-1][0].seconds:.3g} s, padded {calls[-1][1].seconds:.3g} s", flush=True)
        kept_gib = _kept_gib(model_path, dtype)
    check_equal(*calls[0], GRADIENT_TOLERANCE[dtype])
    pairs = [(mine.seconds, published.seconds) for mine, published in calls[1:]]
    return _described(row_of_pairs("padded", shape, pairs), dtype, calls, kept_gib)


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
