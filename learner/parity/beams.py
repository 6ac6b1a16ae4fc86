"""Constrained beam search against the published code's."""

from collections.abc import Iterator
from typing import Any

from learner.parity.comparison import Comparison, difference, unequal
from learner.parity.golden import GoldenSet
from rollout.engine import RolloutEngine

SCORE_TOLERANCE = 1e-3


def compare_beams(golden: GoldenSet, engine: RolloutEngine) -> Iterator[Comparison]:
    """beams.json: the same titles in the same order, from the training path, truncated prompts and the evaluation."""
    with golden.reading("beams.json"):
        record = golden.json("beams.json")
        for part in ("train", "train_truncated", "eval50"):
            yield from _compare(part, record[part], engine)
        found = [golden.prompts[entry["example_id"]] for entry in record["train"]]
        yield unequal("beams: prompts", found, [entry["prompt_token_ids"] for entry in record["train"]])


def _compare(part: str, prompts: list[dict[str, Any]], engine: RolloutEngine) -> Iterator[Comparison]:
    size = len(prompts[0]["sequences"])
    zeros = [0] * len(prompts)
    tokens = [prompt["prompt_token_ids"] for prompt in prompts]
    groups = engine.generate(tokens, zeros, zeros, group_size=size)
    found = [sequence for group in groups for sequence in group.tokens]
    golden = [sequence for prompt in prompts for sequence in prompt["sequences"]]
    yield unequal(f"beams {part}", found, [sequence["token_ids"] for sequence in golden])
    scores = [score for group in groups for score in group.score]
    yield difference(f"beams {part}: score", scores, [sequence["score"] for sequence in golden], SCORE_TOLERANCE)
