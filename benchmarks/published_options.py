"""How the published way is fastest on this machine: the choices that PublishedTrainer leaves open, timed one by one.

benchmarks.end_to_end gives the opponent the best of them.
"""

import itertools
import sys
from typing import Any

import torch

from benchmarks.harness import threads, write_section
from benchmarks.published_way import PublishedTrainer
from benchmarks.shapes import SHAPES, build


def measure(shape: str, groups: int) -> list[dict[str, Any]]:
    """Seconds by stage of one step over `groups` groups for every choice."""
    torch.set_num_threads(threads())
    workload = build(SHAPES[shape])
    example_ids = workload.step_examples(0)[:groups]
    prompts, targets = workload.prompts(example_ids), workload.target_classes(example_ids)
    entries = []
    for checkpointing, python_mask in itertools.product((False, True), (False, True)):
        trainer = PublishedTrainer(
            str(workload.model_path),
            workload.catalog.trie,
            dtype=workload.shape.dtype,
            gradient_checkpointing=checkpointing,
            python_mask=python_mask,
        )
        for batch in sorted({1, 4, groups} & set(range(1, groups + 1))):
            report = trainer.step(prompts, targets, generate_groups=batch, learn_groups=min(batch, 4))
            choice = {"gradient_checkpointing": checkpointing, "python_mask": python_mask, "groups_at_once": batch}
            entries.append(choice | {"seconds": report.seconds})
            print(entries[-1], flush=True)
    return entries


def markdown(entries: list[dict[str, Any]]) -> str:
    lines = ["| gradient checkpointing | mask | groups at once | seconds |", "|---|---|---|---|"]
    for entry in entries:
        seconds = ", ".join(f"{stage} {value:.2f}" for stage, value in entry["seconds"].items())
        mask = "prefix_allowed_tokens_fn" if entry["python_mask"] else "vectorised"
        lines.append(f"| {entry['gradient_checkpointing']} | {mask} | {entry['groups_at_once']} | {seconds} |")
    return "\n".join(lines)


def main(shape: str = "tiny-64", groups: str = "16") -> None:
    entries = measure(shape, int(groups))
    write_section(f"Choices of the published way, {shape}, {groups} groups", markdown(entries), {"options": entries})


if __name__ == "__main__":
    main(*sys.argv[1:])
