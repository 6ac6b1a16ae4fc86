"""What a run leaves for people says what was measured, in words they can read."""

import html
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catalog.build import build_catalog
from catalog.catalog import Catalog
from catalog.config import DataConfig, GeneratedConfig
from catalog.metrics import ndcg_at_k, ranking_metrics
from launch.actors import with_titles
from launch.compose import compose
from launch.config import Config, ConfigError
from launch.progress import Progress
from launch.report import running_mean, write_report
from launch.run import sft_words, summarise
from launch.run_directory import RunDirectory
from launch.train import step_words


@pytest.fixture(scope="module")
def catalog(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    data = DataConfig(cache=str(tmp_path_factory.mktemp("cache")), generated=GeneratedConfig(items=60, users=120))
    return build_catalog(data, str(tiny_tokenizer_dir))


def evaluated(config: Config, ranks: list[int]) -> dict:
    metrics = ranking_metrics(np.array(ranks), config.train.eval_ks)
    return {"example_ids": list(range(len(ranks))), "hit_ranks": ranks, "invalid": 0, "metrics": metrics}


def test_a_narrow_table_does_not_break_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    title = "default: metrics of 1,000 of 1,750 test examples"
    Progress().table(title, ["a", "b"], [["1", "2"]])
    assert capsys.readouterr().out.splitlines()[0] == title


def test_a_table_in_a_file_keeps_its_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    cells = [f"{'a long cell':>30} {column}" for column in range(9)]
    Progress().table("", [str(column) for column in range(9)], [cells])
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert all(cell in last for cell in cells)


def test_a_narrow_terminal_keeps_names_whole_and_all_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    columns = ["run", "model", "steps", "before RL", "RL", "gain", "95% interval", "s / step"]
    row = ["s-unconstrained", "qwen", "80", "0.0569", "0.0614", "-0.0046", "-0.0115 to -0.0005", "12.34"]
    Progress().table("", columns, [row])
    printed = capsys.readouterr().out
    assert all(word in printed for cell in row for word in cell.split())
    assert max(map(len, printed.splitlines())) <= 80


def test_a_table_shows_brackets_of_titles(capsys: pytest.CaptureFixture[str]) -> None:
    titles = ["Duct Tape [white], 2 inch", "Hex Bolt [/] Nut", "Ear Plugs [2-Pack] \\"]
    Progress().table("", ["recommended", "item"], [[title, "1"] for title in titles])
    printed = capsys.readouterr().out
    assert all(f"{title} " in printed for title in titles)


def test_a_table_spells_control_characters_out(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().table("after Bolt\x1b]0;x\x07", ["recommended", "item"], [["Nut\x1b[31m\0 \u202etloB", "1\n"]])
    printed = capsys.readouterr().out
    assert r"after Bolt\x1b]0;x\x07" in printed
    assert r"Nut\x1b[31m\x00 \u202etloB" in printed
    assert not {"\x1b", "\0", "\x07", "\u202e"} & {*printed}


def test_a_step_says_what_was_logged() -> None:
    step = {"groups_with_hit": 0.125, "reward": 0.001, "loss": 1.6e-4, "timing_s/step": 0.5}
    assert step_words([step], {}) == "hit 12%  reward +0.0010  loss +1.6e-04  0.50 s/step"
    with_kl = [step | {"kl": 0.2}, step | {"kl": 0.4}]
    words = step_words(with_kl, {"hr@1": 0.5, "ndcg@10": 0.25})
    assert words.endswith("  kl 3.0e-01  0.50 s/step  valid ndcg@10 0.2500")


def test_sft_says_how_far_an_epoch_is() -> None:
    assert sft_words({"update": 3.0, "updates": 219.0, "loss": 1.5}) == "update 3/219  loss 1.5000"
    assert sft_words({"loss": 1.5, "valid_loss": 2.0, "stop": 1.0}) == "loss 1.5000  valid_loss 2.0000"


@pytest.mark.parametrize(("beams", "ks", "k"), [(5, [1, 5], 5), (20, [10, 1], 10), (20, [1, 10, 20], 20)])
def test_the_gain_is_that_of_ndcg_at_the_largest_cut_off(
    catalog: Catalog, tmp_path: Path, beams: int, ks: list[int], k: int
) -> None:
    config = compose(overrides=[f"runs={tmp_path}", f"train.eval_beams={beams}", f"train.eval_ks={ks}"])
    run = RunDirectory(config, catalog.fingerprint)
    before, after = [-1, 4, -1, 0], [0, 3, beams - 1, -1]
    summary = summarise(config, catalog, run, evaluated(config, before), evaluated(config, after), 0, 3)
    expected = ndcg_at_k(np.array(after), k) - ndcg_at_k(np.array(before), k)
    assert [key for key in summary if key.endswith("_gain")] == [f"ndcg@{k}_gain"]
    assert summary[f"ndcg@{k}_gain"]["mean"] == pytest.approx(expected)
    write_report(run, config, summary, catalog)
    run.close()
    assert f"NDCG@{k} gain of RL over SFT: {expected:+.4f}" in (run.path / "report.html").read_text()


def test_the_report_shows_what_was_generated_last(catalog: Catalog, tmp_path: Path) -> None:
    config = compose(overrides=[f"runs={tmp_path}", "train.eval_beams=5", "train.eval_ks=[5]"])
    run = RunDirectory(config, catalog.fingerprint)
    for step, target in ((9, 5), (10, 7), (20, 6)):  # step 20 is of a longer run, before this one was resumed
        group = {
            "example_id": [0],
            "target_class": [target],
            "candidate_class": [[3, 4, -1, 8, 9, 10, target]],
            "candidate_logprobs": [[[-0.5, -0.75]] * 7],
            "reward": [[-0.5] * 6 + [1.0]],
        }
        pq.write_table(pa.table(group), run.rollouts / f"step-{step}.parquet")
    ranks = evaluated(config, [0, -1])
    summary = summarise(config, catalog, run, ranks, ranks, 0, 3)
    run.log("train", 1, {"loss": 0.5})
    run.log("valid", 1, {"ndcg@5": 0.25})
    write_report(run, config, summary | {"steps": 10}, catalog)
    run.close()
    page = html.unescape((run.path / "report.html").read_text())
    assert "Generated in step 10" in page
    assert re.findall("<figcaption>(.*?)</figcaption>", page) == ["NDCG@5 on the validation split", "loss"]
    rows = re.findall(r"<tr><td>(\d+)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", page)
    shown = [catalog.title(3), catalog.title(4), "(not in the catalogue)", catalog.title(8), catalog.title(9)]
    assert rows[:5] == [(str(rank), title, "-1.25", "-0.500") for rank, title in enumerate(shown, 1)]
    assert rows[5:] == [("7", f"{catalog.title(7)} ✓", "-1.25", "+1.000")]
    assert all(catalog.title(c) in page for c in catalog.examples("train").history_classes(0)[-5:])


def test_the_report_spells_control_characters_of_titles_out(
    data: Path, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    titles = [f"Bolt\0\x1b[{item}m \u202etuN" for item in range(40)]
    pq.write_table(pa.table({"item_id": list(range(40)), "title": titles}), data / "items.parquet")
    config = compose(data=str(data), overrides=[f"runs={tmp_path}/runs", f"data.cache={tmp_path}/cache"])
    catalog = build_catalog(config.data, str(tiny_tokenizer_dir))
    run = RunDirectory(config, catalog.fingerprint)
    group = {"example_id": [0], "target_class": [2], "candidate_class": [[3]]}
    scores = {"candidate_logprobs": [[[-0.5]]], "reward": [[0.0]]}
    pq.write_table(pa.table(group | scores), run.rollouts / "step-1.parquet")
    ranks = evaluated(config, [0, -1])
    write_report(run, config, summarise(config, catalog, run, ranks, ranks, 1, 3), catalog)
    run.close()
    page = (run.path / "report.html").read_text()
    assert not {"\0", "\x1b", "\u202e"} & {*page}
    assert all(rf"Bolt\x00\x1b[{item}m \u202etuN" in page for item in (0, 1, 2, 3))


def test_the_mean_of_a_curve_begins_with_what_there_is() -> None:
    values = np.array([8.0, 2.0, 5.0, 1.0, 6.0])
    expected = [values[max(0, i - 2) : i + 1].mean() for i in range(5)]
    np.testing.assert_allclose(running_mean(values, 3), expected)
    np.testing.assert_array_equal(running_mean(values, 1), values)


def test_saved_groups_that_are_damaged_are_named(catalog: Catalog, tmp_path: Path) -> None:
    config = compose(overrides=[f"runs={tmp_path}", "learner.sft.epochs=0"])
    run = RunDirectory(config, catalog.fingerprint)
    run.close()
    (run.rollouts / "step-1.parquet").write_bytes(b"PAR1")
    ranks = evaluated(config, [0, -1])
    summary = summarise(config, catalog, run, ranks, ranks, 1, 3)
    with pytest.raises(ConfigError, match=r"step-1\.parquet is damaged .*delete it"):
        write_report(run, config, summary, catalog)


def test_without_sft_the_gain_is_not_said_to_be_over_it(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(overrides=[f"runs={tmp_path}", "learner.sft.epochs=0"])
    run = RunDirectory(config, catalog.fingerprint)
    summary = summarise(config, catalog, run, evaluated(config, [-1, 0]), evaluated(config, [0, 0]), 0, 3)
    monkeypatch.setattr("io.text_encoding", lambda encoding, *_: encoding or "ascii")  # as some locales have it
    write_report(run, config, summary, catalog)
    run.close()
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "gain of RL over the model before: +" in page
    assert "SFT" not in page.partition("<h2>Configuration")[0]


def test_saved_groups_can_be_read(catalog: Catalog) -> None:
    classes = pa.array([[3, -1], []], pa.list_(pa.int32()))
    groups = pa.table({"target_class": pa.array([3, 5], pa.int32()), "candidate_class": classes})
    titled = with_titles(groups, catalog)
    assert titled["target_title"].to_pylist() == [catalog.title(3), catalog.title(5)]
    assert titled["candidate_titles"].to_pylist() == [[catalog.title(3), ""], []]
