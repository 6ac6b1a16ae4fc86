"""What the pages link to is there, and what they tell to launch is a configuration."""

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from launch.cli import OWN_PACKAGES
from launch.compose import compose

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/README.md")])
GROUPS = {"CLUSTER": "cluster", "DATA": "data", "MODEL": "model", "ALGORITHM": "algorithm"}


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_imports_what_is_there(page: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for statement in ast.walk(ast.parse(code)):
            match statement:
                case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in OWN_PACKAGES:
                    for imported in statement.names:
                        assert hasattr(import_module(module), imported.name), f"{module}.{imported.name}"


def launches(page: Path) -> list[str]:
    """What stands behind `make launch` in the shell commands of a page; variables of its loops have a value."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    text = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).replace("$rate", "1e-4").replace("$beta", "1e-3")
    return re.findall(r"make launch ((?:[^;#&\n\"]|\"[^\"]*\")*)", text)


COMMANDS = [(page, command) for page in PAGES for command in launches(page)]


def test_the_pages_launch_something() -> None:
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: str(value)[-60:])
def test_what_is_launched_is_a_configuration(
    page: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader's own folders, and YAMLs that the page shows, are made up."""
    monkeypatch.chdir(tmp_path)
    words = dict(word.split("=", 1) for word in shlex.split(command))
    groups = {GROUPS[name]: value for name, value in words.items() if name in GROUPS}
    for value in groups.values():
        if value.endswith(".yaml"):
            Path(value).parent.mkdir(parents=True, exist_ok=True)
            Path(value).write_text("{}")
        elif value.count("/") > 1 or value.startswith("models/"):
            Path(value).mkdir(parents=True, exist_ok=True)
    config = compose(**groups, overrides=shlex.split(words.get("ARGS", "")))
    assert (config.data.path is not None) == ("DATA" in words and not words["DATA"].endswith(".yaml"))
    assert set(words) <= {*GROUPS, "ARGS", "NAME", "STEPS", "DRY_RUN", "RESUME", "OVERWRITE"}
