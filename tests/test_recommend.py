"""`rere recommend` apart from the policy: what it is asked, and which titles are close to an unknown one."""

import difflib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from catalog.build import build_catalog
from catalog.errors import CatalogError
from launch.compose import compose
from launch.config import ConfigError
from launch.policy_of_run import PolicyOfRun, catalogue
from launch.recommend import _known, close_titles, histories_of_file, main
from launch.run_directory import RunDirectory
from learner import checkpoint


def test_options_may_stand_between_the_run_and_the_titles() -> None:
    with pytest.raises(ConfigError, match="--count must be 1 or more, got 0"):
        main(["runs/mine", "--count", "0", "Steel Bolt", "Steel Nut"])
    with pytest.raises(ConfigError, match="a title of the command line is not UTF-8"):
        main(["runs/mine", "Steel Bolt", "--count", "3", "Steel N\udcff"])


def test_a_line_of_a_file_ends_nowhere_within_a_title(tmp_path: Path) -> None:
    histories = [["Bolt\u2028Nut", "Père, \x85"], ["Wire"]]
    lines = [json.dumps(history, ensure_ascii=False) for history in histories]
    (tmp_path / "histories.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert list(histories_of_file(tmp_path / "histories.jsonl")) == histories
    (tmp_path / "histories.jsonl").write_text('["Bolt"]\n', encoding="utf-8-sig")  # as some editors write it
    assert list(histories_of_file(tmp_path / "histories.jsonl")) == [["Bolt"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (" ", "line 2 is empty; leave it out"),
        ("Bolt", "line 2: not JSON"),
        ('"Bolt"', "line 2: a list of titles is needed"),
        ('["Bolt", 7]', "line 2: a list of titles is needed"),
        ("[" * 100_000, "line 2: not JSON"),
        (r'["Bolt \ud800"]', "line 2: a title is half of a character"),
    ],
)
def test_a_line_that_is_no_history_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "histories.jsonl").write_text(f'["Bolt"]\n{line}\n["Nut"]\n')
    with pytest.raises(ConfigError, match=message):
        list(histories_of_file(tmp_path / "histories.jsonl"))


def test_a_title_is_known_in_another_spelling_of_unicode() -> None:
    composed, decomposed = "Caf\u00e9", "Cafe\u0301"
    titles = pa.array([decomposed, "Steel Bolt", "Steel Nut"], pa.large_string())
    catalog: Any = SimpleNamespace(titles=titles)
    histories = [["Steel Nut", composed], ["Lamp", decomposed]]
    assert _known(histories, catalog) == {"Steel Nut": 2, composed: 0, "Lamp": None, decomposed: 0}


def test_close_titles_of_a_small_catalogue_are_those_of_difflib() -> None:
    titles = ["Steel Bolt, 3 inch", "Steel Bolt, 4 inch", "Steel Nut", "Copper Wire", "Nu"]
    for asked in ("Steel Bolt, 5 inch", "Stel Nut", "Nut", "N", "Lamp"):
        assert close_titles(asked, pa.array(titles, pa.large_string())) == difflib.get_close_matches(asked, titles)


def test_close_titles_of_a_large_catalogue_are_found() -> None:
    bolts = [f"Acme Bolt {i:06d}, Pack of {i % 97}" for i in range(100_000)]
    titles = pa.array([*bolts, "Nut"], pa.large_string())
    assert close_titles("Nut", titles) == ["Nut"]
    assert close_titles("Acme Bolt 041234, Pack of 99", titles)[0].startswith("Acme Bolt 041234")


def test_a_run_can_be_asked_from_another_folder(
    data: Path, tiny_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose(data="data")
    built = build_catalog(config.data, str(tiny_tokenizer_dir))
    RunDirectory(config, built.fingerprint).close()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = replace(config, runs=str(tmp_path / "runs"))
    assert catalogue(config, tiny_tokenizer_dir).titles.equals(built.titles)
    shutil.rmtree(tmp_path / ".cache" / "catalog" / built.fingerprint)
    assert catalogue(config, tiny_tokenizer_dir).fingerprint == built.fingerprint  # built again of the run's data
    assert list(elsewhere.iterdir()) == []


def test_a_run_that_was_moved_is_asked_where_it_is_now(
    data: Path, tiny_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    shutil.move(data, before / "data")
    monkeypatch.chdir(before)
    config = compose(data="data")
    built = build_catalog(config.data, str(tiny_tokenizer_dir))
    RunDirectory(config, built.fingerprint).close()
    before.rename(after)
    monkeypatch.chdir(after)
    assert catalogue(config, tiny_tokenizer_dir).titles.equals(built.titles)


def test_the_catalogue_is_that_of_the_run_though_its_data_have_gone(
    data: Path, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = compose(data=str(data), overrides=[f"runs={tmp_path}/runs", f"data.cache={tmp_path}/cache"])
    built = build_catalog(config.data, str(tiny_tokenizer_dir))
    RunDirectory(config, built.fingerprint).close()
    shutil.rmtree(built.path)
    assert catalogue(config, tiny_tokenizer_dir).fingerprint == built.fingerprint
    other = replace(config, name="other")
    RunDirectory(other, "0").close()
    with pytest.raises(ConfigError, match=f"the catalogue is {built.fingerprint}, but run .*other was started with 0"):
        catalogue(other, tiny_tokenizer_dir)
    shutil.rmtree(data)
    assert catalogue(config, tiny_tokenizer_dir).titles.equals(built.titles)
    shutil.rmtree(built.path)
    with pytest.raises(CatalogError, match="data"):
        catalogue(config, tiny_tokenizer_dir)


def test_where_the_newest_checkpoint_is_damaged_others_are_offered(data: Path, tmp_path: Path) -> None:
    config = compose(data=str(data), overrides=[f"runs={tmp_path}/runs"])
    run = RunDirectory(config, "0")
    run.close()
    for name in ("sft", "step-1", "step-2"):
        checkpoint.begin(run.checkpoints / name)
        checkpoint.commit(run.checkpoints / name, {})
    (run.checkpoints / "step-2" / "state.json").unlink()
    with pytest.raises(
        checkpoint.CheckpointError, match=r"step-2: .*missing; intact, for --checkpoint, are sft, step-1$"
    ):
        PolicyOfRun.of(run.path)
    shutil.rmtree(run.checkpoints / "sft")
    (run.checkpoints / "step-1" / "state.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"step-1: .*missing; no other is intact$"):
        PolicyOfRun.of(run.path, "step-1")
