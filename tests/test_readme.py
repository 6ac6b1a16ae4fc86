"""What README.md tells to write works as it stands."""

import re
from pathlib import Path

import pytest

from launch.cli import main

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_reward_of_the_readme_passes_its_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n# (my_rewards\.py)\n(.*?)```", README.read_text(), re.DOTALL)
    (command,) = re.findall(r"rere (reward check my_rewards\.py:\w+)", README.read_text())
    (tmp_path / code[0]).write_text(code[1])
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 0
    assert "short_titles" in capsys.readouterr().out
