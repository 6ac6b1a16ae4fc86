"""Writing a reward: what it sees, how it is found, and what is said when it returns nonsense."""

import re
from pathlib import Path

import faulty_rewards
import numpy as np
import pyarrow as pa
import pytest
from reward_catalog import build_sample_catalog
from rich.console import Console

from launch.cli import main as command
from rewards.check import check, main
from rewards.errors import RewardError
from rewards.group import Group, Groups
from rewards.interface import make_reward, score
from rewards.registry import resolve
from rewards.samples import sample_groups

FAULTY = Path(faulty_rewards.__file__)


def score_samples(name: str, **args: object) -> list[list[float]]:
    groups = sample_groups()
    return score(name, make_reward(name, getattr(faulty_rewards, name), groups.catalog, args), groups).to_pylist()


def test_a_group_shows_what_was_rolled_out() -> None:
    group = sample_groups()[1]
    assert (group.example_id, group.policy_version, group.user_id) == (1, 0, "ben")
    assert group.history_titles == ["Copper Wire 12 AWG, 100 ft", "Copper Wire 14 AWG, 100 ft"]
    assert group.target_title == "Digital Caliper, 6 inch"
    assert group.candidate_classes == [4, 3, 9, 5, 0, 2]
    assert group.candidate_titles[group.candidate_classes.index(group.target_class)] == group.target_title
    assert bytes(group.candidate_tokens[2]).decode() == group.candidate_titles[2] == "Safety Glasses, Clear"
    assert group.scores == sorted(group.scores, reverse=True)


def test_a_candidate_that_is_no_title_has_none() -> None:
    group = sample_groups()[-1]
    assert group.candidate_classes[1] == -1
    assert group.candidate_titles[1] == ""


def test_groups_are_a_sequence() -> None:
    groups = sample_groups()
    assert [group.example_id for group in groups] == [0, 1, 2, 3]
    assert groups[-1] == groups[3]
    assert list(groups[1:3]) == [groups[1], groups[2]]
    assert list(groups[2:2]) == []
    with pytest.raises(IndexError):
        groups[4]


def test_groups_of_different_sizes_keep_their_own_candidates() -> None:
    whole = sample_groups()
    sizes = [2, 6, 1, 3]
    columns = {
        name: [row[:size] for row, size in zip(whole.table[name].to_pylist(), sizes, strict=True)]
        if name.startswith("candidate_") or name == "score"
        else whole.table[name].to_pylist()
        for name in whole.table.column_names
    }
    groups = Groups(pa.table(columns, schema=whole.table.schema), whole.catalog, whole.split)
    for group, all_of_it, size in zip(groups, whole, sizes, strict=True):
        assert group.candidate_classes == all_of_it.candidate_classes[:size]
        assert group.candidate_titles == all_of_it.candidate_titles[:size]
        assert group.candidate_tokens == all_of_it.candidate_tokens[:size]
        assert group.scores == all_of_it.scores[:size]


def test_functions_and_classes_score_alike() -> None:
    by_function = score_samples("title_length")
    assert by_function == [pytest.approx([len(t) / 100 for t in group.candidate_titles]) for group in sample_groups()]
    assert score_samples("Constant", value=0.5) == [[0.5] * 6] * 4


def test_arrow_lists_of_any_width_are_taken() -> None:
    assert score_samples("AsArrow") == score_samples("AsLargeArrow") == [[1.0] * 6] * 4
    assert score_samples("ChunkedScores") == [pytest.approx(group.scores) for group in sample_groups()]


def test_groups_may_be_yielded() -> None:
    assert score_samples("Yields") == score_samples("Constant")


def test_tensors_are_taken_off_the_graph() -> None:
    assert score_samples("tensors")[0] == pytest.approx(sample_groups()[0].scores)
    assert score_samples("tensors_in_bfloat16")[0] == pytest.approx(sample_groups()[0].scores, rel=1e-2)


def test_integers_of_any_size_are_taken() -> None:
    assert score_samples("large_integers") == [[pytest.approx(1e20)] * 6] * 4


@pytest.mark.parametrize("shuffled", [[2, 0, 3, 1], [3, 2, 1, 0]])
def test_the_order_of_groups_does_not_matter(shuffled: list[int]) -> None:
    groups = sample_groups()
    other = Groups(groups.table.take(shuffled), groups.catalog, groups.split)
    for name in ("rule", "ranking", "diversity", "popularity"):
        reward = make_reward(name, resolve(name), groups.catalog, {})
        straight = score(name, reward, groups).to_pylist()
        assert score(name, reward, other).to_pylist() == [straight[row] for row in shuffled]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"(?s)reward 'raises' raised on group 2:.*KeyError: 'no price for PLA Filament"),
        ("not_a_number", "reward 'not_a_number' gave nan to the candidate at rank 5 of group 2"),
        ("too_large", r"reward 'too_large' gave 1e\+300 to the candidate at rank 0 of group 0; .* finite float32"),
        ("too_large_integers", r"returned 6 values \(\[1000.*expected one float for each"),
        ("one_short", r"reward 'one_short' returned 5 values \(\[.*\]\) for group 2, which has 6 candidates"),
        ("one_number", r"reward 'one_number' returned 1.0 for group 0, which has 6 candidates"),
        ("nothing", "reward 'nothing' returned None for group 0"),
        ("words", r"reward 'words' returned 6 values \(\['Steel .*expected one float for each"),
        ("coroutine", "reward 'coroutine' is async; write a plain function or class"),
        ("AsyncCall", "reward 'AsyncCall' is async; write a plain function or class"),
        ("exits", r"reward 'exits' raised on group 0"),
        (
            "YieldsAndRaises",
            r"(?s)reward 'YieldsAndRaises' raised on groups 0, 1, 2, 3:.*TypeError: unsupp",
        ),
        ("OneGroupShort", r"reward 'OneGroupShort' returned 3 lists for 4 groups \(groups 0, 1, 2, 3\)"),
        ("ArrowWords", r"reward 'ArrowWords' returned 6 values \(\['Steel .* for group 0"),
        ("Flat", r"reward 'Flat' returned 24 numbers for 4 groups .*; expected a list for each"),
        ("CannotStart", r"(?s)reward 'CannotStart' could not be made with args {}:.*FileNotFoundError: weights.bin"),
        ("NotCallable", "class NotCallable needs a method __call__"),
        ("WithoutCatalog", "first parameter of its __init__ must be called catalog; it takes \\(value: float"),
    ],
)
def test_nonsense_is_named(name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score_samples(name)


def test_a_traceback_shows_only_the_reward() -> None:
    with pytest.raises(RewardError) as caught:
        score_samples("raises")
    assert "interface.py" not in str(caught.value)


@pytest.mark.parametrize("name", ["title_length", "Constant"])
def test_unknown_arguments_are_named(name: str) -> None:
    with pytest.raises(RewardError, match=f"reward '{name}': got an unexpected keyword argument 'colour'"):
        score_samples(name, colour="red")


def test_check_shows_every_group_and_its_rewards() -> None:
    console = Console(record=True, width=120)
    rewards = check(f"{FAULTY}:title_length", {}, sample_groups(), console)
    text = console.export_text()
    for group, row in zip(sample_groups(), rewards.to_pylist(), strict=True):
        assert f"target   {group.target_title}" in text
        assert f"{row[0]:+.4f}" in text
    assert "24 candidates in 4 groups" in text


def test_check_spells_control_characters_of_titles_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.samples.TITLES", ["Bolt\x1b[31m [white]\0"] * 10)
    console = Console(record=True, width=200)
    check(f"{FAULTY}:title_length", {}, sample_groups(), console)
    text = console.export_text()
    assert r"Bolt\x1b[31m [white]\x00" in text
    assert not {"\x1b", "\0"} & {*text}


def test_check_says_of_a_slow_reward_that_it_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rewards.check.PATIENCE_S", 0.01)
    lines = "import time", "def slow(group):", "    time.sleep(0.1)", "    return [0.0] * len(group.candidate_titles)"
    (tmp_path / "mine.py").write_text("\n".join(lines) + "\n")
    check(f"{tmp_path}/mine.py:slow", {}, sample_groups(), Console(quiet=True))
    assert "reward 'slow' has been at work for 0.01 s; Ctrl-C ends it" in capsys.readouterr().err


def test_check_warns_of_a_reward_that_teaches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{FAULTY}:Constant", "--args", "value=0.25"]) == 0
    shown = capsys.readouterr().out
    assert "+0.2500" in shown
    assert "4 of 4 groups got one and the same reward throughout" in " ".join(shown.split())


@pytest.mark.parametrize("args", [["bonus"], ["=2"], ["bonus=[1"], ["bonus=1: 2: 3"], ["bonus=\udcff"]])
def test_arguments_of_check_that_cannot_be_read_are_named(args: list[str]) -> None:
    with pytest.raises(RewardError, match=f"--args {re.escape(repr(args[0]))}: "):
        main(["rule", "--args", *args])


def test_arguments_of_check_stand_for_what_they_do_in_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BONUS", "0.75")
    assert main([f"{FAULTY}:Constant", "--args", "value=${oc.decode:${oc.env:BONUS}}"]) == 0
    assert "+0.7500" in capsys.readouterr().out
    with pytest.raises(RewardError, match=r"--args value: .*NO_SUCH_VARIABLE"):
        main([f"{FAULTY}:Constant", "--args", "value=${oc.env:NO_SUCH_VARIABLE}"])


@pytest.mark.parametrize("size", [["--groups", "0"], ["--groups", "-1"], ["--candidates", "0"]])
def test_check_refuses_to_try_a_reward_on_nothing(
    tmp_path: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str], size: list[str]
) -> None:
    catalog = build_sample_catalog(tmp_path, tiny_tokenizer_dir)
    assert command(["reward", "check", "rule", "--catalog", str(catalog.path), *size]) == 1
    assert "error: a reward is tried on 1 group of 1 candidate or more" in capsys.readouterr().err


def test_a_group_can_be_made_by_hand() -> None:
    group = Group(
        example_id=0,
        policy_version=0,
        user_id="u",
        history_titles=["a"],
        history_classes=[0],
        target_title="b",
        target_class=1,
        candidate_titles=["b", "longer"],
        candidate_classes=[1, 2],
        candidate_tokens=[[1], [2]],
        scores=[-1.0, -2.0],
    )
    np.testing.assert_allclose(faulty_rewards.title_length(group), [0.01, 0.06])
