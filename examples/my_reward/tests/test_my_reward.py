"""Tests of the two rewards: on a group made by hand, and on rere's sample groups."""

import pytest
from my_reward.brands import SameBrand
from my_reward.words import near_miss

from rewards.group import Group
from rewards.interface import make_reward, score
from rewards.samples import SampleCatalog, sample_groups


def test_near_miss_counts_shared_words() -> None:
    group = Group(
        example_id=0,
        policy_version=0,
        user_id="u",
        history_titles=["Steel Hex Nut"],
        history_classes=[2],
        target_title="Steel Hex Bolt",
        target_class=0,
        candidate_titles=["Steel Hex Bolt", "steel rod", "Copper Wire"],
        candidate_classes=[0, 5, 3],
        candidate_tokens=[[1], [2], [3]],
        scores=[-1.0, -2.0, -3.0],
    )
    assert near_miss(group) == pytest.approx([1.0, 1 / 3, 0.0])


def test_same_brand_pays_less_for_a_brand_that_the_user_knows() -> None:
    rewards = SameBrand(SampleCatalog(), bonus=2.0, known=0.25)(sample_groups())
    assert rewards[0] == [0.5, 0.5, 0.5, 0.0, 0.0, 0.0]  # ann has bought "Steel ..." and wants it again
    assert rewards[1] == [0.0, 0.0, 0.0, 2.0, 0.0, 0.0]  # ben has bought no "Digital ..." yet


@pytest.mark.parametrize("written", [near_miss, SameBrand])
def test_every_sample_group_is_scored(written: type) -> None:
    groups = sample_groups()
    rewards = score("mine", make_reward("mine", written, groups.catalog, {}), groups)
    assert rewards.value_lengths().to_pylist() == [6, 6, 6, 6]
