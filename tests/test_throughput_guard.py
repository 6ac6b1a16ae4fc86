"""What a training step computes, against the published way: counted tokens, which no busy machine can disturb."""

import pytest

from benchmarks.harness import peak_memory

RATIOS = {"rollout": 6.8, "learn": 9.5}
"""Tokens of the published way per token of ours, for 4 groups of 16, when this was written."""
LARGEST_DROP = 1 / 3


@pytest.mark.slow
def test_a_step_feeds_several_times_fewer_tokens_than_the_published_way() -> None:
    counted = peak_memory("benchmarks.counted_work:count").result  # an engine of its own needs a process of its own
    for stage, expected in RATIOS.items():
        ours, theirs = counted["ours"][stage], counted["theirs"][stage]
        assert theirs / ours > expected * (1 - LARGEST_DROP), (
            f"{stage}: ours feeds {ours} tokens, the published way {theirs}; the ratio was {expected}"
        )
