"""How a reward is found: by its registered name, by import, or in a file."""

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import faulty_rewards
import pytest

from rewards import registry
from rewards.errors import RewardError
from rewards.ranking import Ranking
from rewards.registry import registered_names, resolve

FAULTY = Path(faulty_rewards.__file__)


def test_found_by_name_import_path_and_file(tmp_path: Path) -> None:
    assert resolve("ranking") is resolve("ranking_only") is Ranking
    assert resolve("rewards.ranking:Ranking") is Ranking
    (tmp_path / "near_module.py").write_text("def f(group):\n    return [0.0]\n")
    assert resolve("near_module:f", root=tmp_path)(None) == [0.0]
    assert resolve("./near_module.py:f", root=tmp_path)(None) == [0.0]
    assert resolve(f"{tmp_path}/near_module.py:f")(None) == [0.0]
    (tmp_path / "near_module.py").rename(tmp_path / "near:module.py")
    assert resolve(f"{tmp_path}/near:module.py:f")(None) == [0.0]
    sys.modules.pop("near_module")
    sys.path.remove(str(tmp_path))


def test_a_file_is_run_once(tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text("open(__file__ + '.runs', 'a').write('.')\ndef f(group):\n    return [0.0]\n")
    assert resolve(f"{tmp_path}/counted.py:f") is resolve("counted.py:f", root=tmp_path)
    assert (tmp_path / "counted.py.runs").read_text() == "."


def test_found_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [EntryPoint("cheap", "faulty_rewards:title_length", registry.ENTRY_POINTS)]
    monkeypatch.setattr(registry, "entry_points", lambda group, name=None: [e for e in installed if name != "x"])
    assert resolve("cheap") is faulty_rewards.title_length
    assert registered_names()[-1] == "cheap"


def test_a_module_that_another_package_hides_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "rewards").mkdir()
    for file in ("rewards/mine.py", "learner.py"):
        (tmp_path / file).write_text("def reward(group): ...")
    with pytest.raises(RewardError, match=r"Python finds 'rewards' in .* before .*; write 'rewards/mine\.py:name'"):
        resolve("rewards.mine:reward", root=tmp_path)
    with pytest.raises(RewardError, match=r"Python finds 'learner' in .* before .*; write 'learner\.py:name'"):
        resolve("learner:reward", root=tmp_path)
    assert callable(resolve("learner.py:reward", root=tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rankin", "'rankin' is not registered; did you mean 'ranking'"),
        ("no_such_module:f", "there is no module 'no_such_module', neither installed nor under"),
        ("faulty_rewards:title_lenth", "faulty_rewards has no 'title_lenth'; it has .*title_length"),
        ("no_such_file.py:f", "there is no file .*no_such_file.py"),
        ("my_rewards.py", "add which reward of the file, as in 'my_rewards.py:my_reward'"),
        (":f", "write 'package.module:Name' or 'path/file.py:name'"),
        ("faulty_rewards:", "write 'package.module:Name' or 'path/file.py:name'"),
    ],
)
def test_what_is_not_found_is_named(name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        resolve(name)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import no_such_package",
            r"broken_module needs the module 'no_such_package', which is missing\n(?s:.*)line 1, in <module>",
        ),
        ("raise SystemExit(0)", r"importing broken_module failed: SystemExit\(0\)\n(?s:.*)line 1, in <module>"),
    ],
)
def test_a_module_that_does_not_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "broken_module.py").write_text(code)
    with pytest.raises(RewardError, match=message):
        resolve("broken_module:f", root=tmp_path)


def test_a_file_that_does_not_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    for _ in range(2):
        with pytest.raises(
            RewardError, match=r"running .*broken.py failed: ModuleNotFoundError.*no_such_package"
        ) as caught:
            resolve(f"{tmp_path}/broken.py:f")
        assert re.search(r'Traceback .*\n  File ".*broken.py", line 1, in <module>', str(caught.value))


def test_a_file_in_no_package_has_no_relative_imports(tmp_path: Path) -> None:
    (tmp_path / "relative.py").write_text("from .other import near\n")
    with pytest.raises(RewardError, match="attempted relative import with no known parent package"):
        resolve(f"{tmp_path}/relative.py:near")


def test_a_file_without_the_reward_lists_its_own(tmp_path: Path) -> None:
    own = "def near(group):\n    return [0.0]\ndef _apart(group):\n    return [0.0]\n"
    (tmp_path / "mine.py").write_text(f"from rewards.group import Group\n{own}")
    with pytest.raises(RewardError, match=r"has no 'nere'; it has near$"):
        resolve(f"{tmp_path}/mine.py:nere")


def test_a_file_that_ends_the_program_is_named(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(RewardError, match=r"running .*leaves.py failed: SystemExit"):
        resolve(f"{tmp_path}/leaves.py:f")
    (tmp_path / "stopped.py").write_text("raise KeyboardInterrupt\n")  # by whoever waits for it
    with pytest.raises(KeyboardInterrupt):
        resolve(f"{tmp_path}/stopped.py:f")


def test_a_file_finds_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "neighbour_of_mine.py").write_text("def f(group):\n    return [0.5]\n")
    (tmp_path / "own" / "with_neighbour.py").write_text("from neighbour_of_mine import f\n")
    assert resolve("own/with_neighbour.py:f", root=tmp_path)(None) == [0.5]
    assert resolve("with_neighbour.py:f", root=tmp_path)(None) == [0.5]  # wherever Python looks for modules


@pytest.mark.parametrize("lazily", [False, True])
def test_neighbours_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazily: bool) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    lines = ["def f(group):", "    import twin_of_both", "    return [twin_of_both.VALUE]"]
    for folder, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "twin_of_both.py").write_text(f"VALUE = {value}\n")
        (tmp_path / folder / "scores.py").write_text("\n".join(lines if lazily else [lines[1].strip(), *lines]) + "\n")
    try:
        assert resolve("one/scores.py:f", root=tmp_path)(None) == [1.0]
        with pytest.raises(RewardError, match=r"scores.py imports 'twin_of_both'.*takes .*one/twin.* not .*two/twin"):
            resolve("two/scores.py:f", root=tmp_path)
    finally:
        sys.modules.pop("twin_of_both", None)


def test_a_neighbour_behind_a_module_of_python_is_named_where_it_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "statistics.py").write_text("")
    (tmp_path / "idle.py").write_text("def f(group):\n    return [0.0]\n")
    assert resolve("idle.py:f", root=tmp_path)(None) == [0.0]
    (tmp_path / "between.py").write_text("import statistics\n")
    (tmp_path / "meant.py").write_text("import between\n")
    with pytest.raises(RewardError, match=r"between.py imports 'statistics', for which Python takes .*statistics.py"):
        resolve("meant.py:f", root=tmp_path)
