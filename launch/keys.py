"""Every key of the configuration with its default and its meaning: `rere keys`, and docs/configuration.md.

Both are read off the dataclasses, where a string under each field says what it means.
"""

import argparse
import ast
import difflib
import inspect
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from launch.config import Config, ConfigError

WIDTH = 100
TABLE = ("| key | type | default | meaning |", "|---|---|---|---|")
PREAMBLE = """# Configuration

Every key, as `.venv/bin/rere keys` prints it; `.venv/bin/rere keys clip` prints those whose names hold that word. Set
keys with `ARGS="section.key=value ..."`, or in a YAML that `CLUSTER=`, `DATA=`, `MODEL=` or `ALGORITHM=` names. These
are the defaults before any YAML: where nothing else is named, `configs/cluster/local.yaml`,
`configs/data/embedded.yaml`, `configs/model/small.yaml` and `configs/algorithm/rere.yaml` change some of them.
`make launch DRY_RUN=1` prints what results. This page is what `.venv/bin/rere keys --markdown` prints."""


@dataclass(frozen=True)
class Key:
    """One key that can be set."""

    name: str
    """With its sections, such as learner.sft.epochs."""
    allowed: str
    """Its type, or the values that it takes."""
    default: str
    """As YAML takes it."""
    meaning: str
    """One line, however long."""


def keys() -> list[Key]:
    """All keys of a run's configuration in the order of the dataclasses; those of a reward term once."""
    return list(_keys_of(Config(), ""))


def _keys_of(section: Any, prefix: str) -> Iterator[Key]:
    types, meanings = get_type_hints(type(section)), _meanings(type(section))
    for field in fields(section):
        name, default = prefix + field.name, getattr(section, field.name)
        if is_dataclass(default):
            yield from _keys_of(default, f"{name}.")
        elif default and isinstance(default, list) and is_dataclass(default[0]):
            shown = ", ".join(f"{{name: {term.name}}}" for term in default)
            yield Key(name, "list of mappings", f"[{shown}]", meanings[field.name])
            yield from _keys_of(default[0], f"{name}[].")
        else:
            yield Key(name, _allowed(types[field.name]), _as_yaml(default), meanings[field.name])


def _meanings(section: type) -> dict[str, str]:
    """What the string under each field of a dataclass says."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    meanings = {}
    for statement, below in zip(tree.body, tree.body[1:], strict=False):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                meanings[name] = " ".join(text.split())
    return meanings


def _allowed(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    name = str(kind) if get_args(kind) else kind.__name__
    return name.replace("typing.Any", "any").replace(" | None", " or null")


def _as_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return value if value.isprintable() and value.strip('"') == value and value else json.dumps(value)
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else str(value)


def as_text(found: Sequence[Key]) -> str:
    """For a terminal: a key with its default, and under it what it means."""
    return "\n".join(
        f"{key.name}: {key.allowed} = {key.default}\n"
        + textwrap.fill(key.meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")
        for key in found
    )


def as_markdown() -> str:
    """The content of docs/configuration.md: a table for each section."""
    lines, before = [PREAMBLE], None
    for key in keys():
        section, _, name = key.name.rpartition(".")
        if section != before:
            lines += ["", f"## {section or 'Top level'}", "", *TABLE]
            before = section
        default = textwrap.shorten(key.default, 60, placeholder=" ...")
        cells = [f"`{name}`", key.allowed, f"`{default}`", key.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """`rere keys [WORD]`. Raises ConfigError where no key holds that word."""
    parser = argparse.ArgumentParser(prog="rere keys", description="Keys of the configuration, defaults and meanings.")
    parser.add_argument("word", nargs="?", default="", help="a section or part of a name, such as learner.sft or clip")
    parser.add_argument("--markdown", action="store_true", help="all of them, as docs/configuration.md")
    options = parser.parse_args(arguments)
    if options.markdown:
        print(as_markdown(), end="")
        return 0
    known = keys()
    found = [key for key in known if options.word in key.name]
    if not found:
        near = difflib.get_close_matches(options.word, [key.name for key in known], n=3, cutoff=0.5)
        guess = f"; did you mean {' or '.join(near)}?" if near else "; `rere keys` lists all"
        raise ConfigError(f"no key is called {options.word!r} or holds it{guess}")
    print(as_text(found))
    return 0
