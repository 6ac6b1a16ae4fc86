"""What a run has logged: a line of JSON per entry, of which a killed process may have written half."""

import json
import os
from pathlib import Path
from typing import Any

from catalog.atomic import writing
from launch.config import ConfigError


def append_line(path: Path, line: dict[str, Any]) -> None:
    """line: has `phase` and `step`. Raises CannotWrite naming the file."""
    with writing(path), path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def cut_torn_line(path: Path) -> None:
    """Drop the end that a killed process has not finished."""
    if path.is_file():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def logged_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines. Raises ConfigError naming one that is damaged."""
    content = path.read_bytes() if path.is_file() else b""
    lines = []
    for number, text in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            line = json.loads(text)
            lines.append({"phase": line["phase"], "step": line["step"], **line})
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number} is damaged ({error!r}); delete that line") from error
    return lines
