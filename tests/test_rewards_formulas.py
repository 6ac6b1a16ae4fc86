"""The reward formulas: against the published code, against hand-worked groups, and for all groups."""

import json
import math
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.errors import RewardError
from rewards.group import Groups
from rewards.interface import make_reward
from rewards.layout import Layout
from rewards.ranking import Formula, Ranking, ranking_rewards
from rewards.rule import rule_rewards
from rewards.samples import SampleCatalog

NO_TITLE = -1
Drawn = tuple[list[list[int]], list[int]]


def groups(candidates: list[list[int]], targets: list[int]) -> pa.Table:
    """The two columns that the formulas read."""
    return pa.table(
        {
            "candidate_class": pa.array(candidates, pa.list_(pa.int32())),
            "target_class": pa.array(targets, pa.int32()),
        }
    )


@st.composite
def some_groups(draw: st.DrawFn) -> Drawn:
    """Groups of 0 to 16 candidates, of few classes so that hits are frequent."""
    candidates = draw(st.lists(st.lists(st.integers(-1, 5), max_size=16), min_size=1, max_size=6))
    targets = draw(st.lists(st.integers(0, 5), min_size=len(candidates), max_size=len(candidates)))
    return candidates, targets


def test_equal_the_published_code(golden_dir: Path) -> None:
    golden = json.loads((golden_dir / "rewards.json").read_text())["groups"]
    classes = [[NO_TITLE if item is None else item for item in group["item_ids"]] for group in golden]
    table = groups(classes, [group["target_item_id"] for group in golden])
    rule, ranking = (np.array(rewards(table).to_pylist()) for rewards in (rule_rewards, ranking_rewards))

    def published(setting: str) -> np.ndarray:
        return np.array([group["results"][setting]["rewards"] for group in golden])

    np.testing.assert_allclose(rule, published("rule"), atol=1e-7)
    np.testing.assert_allclose(rule + ranking, published("ranking"), atol=1e-7)
    np.testing.assert_allclose(ranking, published("rankingOnly"), atol=1e-7)


def test_worked_by_hand() -> None:
    table = groups([[7, 3, 9], [3, 4, 5]], [3, 8])
    w = [1.0, 1 / math.log2(3), 0.5]
    assert rule_rewards(table).to_pylist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    published = ranking_rewards(table).to_pylist()
    assert published[0] == pytest.approx([-w[0] / sum(w), 0.0, -w[2] / sum(w)])
    assert published[1] == [0.0, 0.0, 0.0]
    paper = ranking_rewards(table, formula="paper").to_pylist()
    assert paper[0] == pytest.approx([-1.0 / 1.5, 0.0, -0.5 / 1.5])
    assert paper[1] == pytest.approx([-weight / sum(w) for weight in w])


def test_nothing_but_hits_gets_no_ranking_reward() -> None:
    for formula in ("published", "paper"):
        assert ranking_rewards(groups([[2, 2]], [2]), formula).to_pylist() == [[0.0, 0.0]]


def test_the_registered_reward_is_the_published_formula_unless_told_otherwise() -> None:
    table = groups([[7, 3, 9], [3, 4, 5]], [3, 8])
    seen = Groups(table, SampleCatalog(), "train")
    assert Ranking(SampleCatalog())(seen) == ranking_rewards(table, "published")
    assert Ranking(SampleCatalog(), "paper")(seen) == ranking_rewards(table, "paper")


def test_sums_know_groups_without_candidates() -> None:
    layout = Layout.of(groups([[], [1, 2], []], [0, 0, 0]))
    assert layout.sum(np.array([2.0, 3.0])).tolist() == [0.0, 5.0, 0.0]
    assert layout.any(np.array([False, True])).tolist() == [False, True, False]


def test_an_unknown_formula_is_refused() -> None:
    with pytest.raises(RewardError, match="formula 'papr' is none of published, paper"):
        ranking_rewards(groups([[1]], [1]), "papr")
    for name in ("ranking", "ranking_only"):
        with pytest.raises(RewardError, match=r"^a ranking reward's formula 'papr' is none of published, paper$"):
            make_reward(name, Ranking, SampleCatalog(), {"formula": "papr"})


@given(some_groups(), st.sampled_from(["published", "paper"]))
def test_a_better_ranked_wrong_candidate_is_never_punished_less(drawn: Drawn, formula: Formula) -> None:
    candidates, targets = drawn
    for row, classes, target in zip(
        ranking_rewards(groups(candidates, targets), formula).to_pylist(), candidates, targets, strict=True
    ):
        wrong = [reward for reward, item in zip(row, classes, strict=True) if item != target]
        assert all(reward <= 0 for reward in wrong)
        assert wrong == sorted(wrong)


@given(some_groups())
def test_without_a_hit_the_published_ranking_reward_is_zero(drawn: Drawn) -> None:
    candidates, targets = drawn
    for row, classes, target in zip(
        ranking_rewards(groups(candidates, targets)).to_pylist(), candidates, targets, strict=True
    ):
        if target not in classes:
            assert row == [0.0] * len(classes)
        elif set(classes) != {target}:
            assert sum(row) < 0


@given(some_groups(), st.sampled_from(["published", "paper"]))
def test_the_papers_penalties_sum_to_minus_one(drawn: Drawn, formula: Formula) -> None:
    candidates, targets = drawn
    for row, classes, target in zip(
        ranking_rewards(groups(candidates, targets), formula).to_pylist(), candidates, targets, strict=True
    ):
        if formula == "paper" and set(classes) - {target}:
            assert sum(row) == pytest.approx(-1.0, abs=1e-5)
        else:
            assert sum(row) >= -1.0 - 1e-5


@given(some_groups(), st.randoms())
def test_the_order_of_groups_does_not_matter(drawn: Drawn, random: Random) -> None:
    candidates, targets = drawn
    order = list(range(len(candidates)))
    random.shuffle(order)
    shuffled = groups([candidates[i] for i in order], [targets[i] for i in order])
    for rewards in (rule_rewards, ranking_rewards):
        straight = rewards(groups(candidates, targets)).to_pylist()
        assert rewards(shuffled).to_pylist() == [straight[i] for i in order]


def test_slices_and_chunks_are_read_right() -> None:
    table = groups([[1, 2], [3], [4, 5, 6], []], [2, 3, 4, 0])
    pieces = pa.concat_tables([table.slice(2), table.slice(0, 2)])
    assert rule_rewards(pieces).to_pylist() == [[1.0, 0.0, 0.0], [], [0.0, 1.0], [1.0]]


def test_no_groups_have_no_rewards() -> None:
    for rewards in (rule_rewards, ranking_rewards):
        assert rewards(groups([], [])).to_pylist() == []
