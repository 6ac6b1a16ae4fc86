"""How a configuration comes about: defaults, the YAML of each group, overrides; and how a run keeps it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationResolutionError, OmegaConfBaseException

from catalog.atomic import atomic_file
from launch.config import FIXED_IN_A_RUN, Config, ConfigError, check
from launch.differences import differences
from launch.group_yaml import group_yaml, read_yaml

DEFAULTS = {"cluster": "local", "data": "embedded", "model": "small", "algorithm": "rere"}
"""The YAML of each group that is taken where none is named."""
NAMED_BY = {"cluster": "cluster.name", "data": "data.path", "model": "model.path"}
"""The key by which it shows what a group was named for."""
DEVICES = ("name", "address", "device", "gpus", "gpus_per_node", "colocate")
"""Keys of `cluster` that say where a run computes."""
IN_CHECKPOINTS = {"learner": ("zero_stage", "dtype"), "rollout": ("dtype",)}
"""Keys that the checkpoints of a run are written for."""
NO_LIST = "AnyNode is not a ListConfig, TupleConfig, list, or tuple."
"""OmegaConf's words for a single value where a list is expected."""


OCTAL = re.compile(r"[+-]?0[0-9_]+")
"""Numbers that YAML 1.1 does not read as people do."""


def compose(
    cluster: str | None = None,
    data: str | None = None,
    model: str | None = None,
    algorithm: str | None = None,
    overrides: Sequence[str] = (),
    started: Path | None = None,
) -> Config:
    """Defaults, then the YAML of each group, then `section.key=value` overrides; the later wins.

    Each is the name of a YAML or the path of one, data and model also a folder, model also a name of the Hugging Face
    hub; an override of data.path or model.path, or one of them in any of the YAMLs, counts as naming one. Raises
    ConfigError naming file, key and value, also where a later YAML would undo what one of the first three names.

    started: the config.yaml of a run to continue, which takes the place of the defaults; with another cluster, see
    `_moved`. Of the YAML of another group only what must be as it was counts then, so that something else is refused.
    """
    return _checked(_tree(cluster, {"data": data, "model": model, "algorithm": algorithm}, overrides, started))


def place(
    cluster: str | None, data: str | None, model: str | None, algorithm: str | None, overrides: Sequence[str]
) -> tuple[str, str]:
    """Folder of runs, and name in it, of the run that is meant, whatever else is said of it. Raises ConfigError."""
    ours = [text for text in overrides if text.startswith(("name=", "runs="))]
    config = _object(_tree(cluster, {"data": data, "model": model, "algorithm": algorithm}, ours))
    return config.runs, config.name


def unheeded(
    cluster: str | None,
    data: str | None,
    model: str | None,
    algorithm: str | None,
    overrides: Sequence[str],
    started: Path,
) -> list[str]:
    """Notes on what the YAMLs named for a run that goes on say, but do not change, a line for each key."""
    groups = {"data": data, "model": model, "algorithm": algorithm}
    goes_on, said = (_object(_tree(cluster, groups, overrides, started, every)) for every in (False, True))
    return [
        f"note: {key} stays {old!r}; DATA=, MODEL= and ALGORITHM= do not change it ({new!r} there), ARGS= does"
        for section in fields(Config)
        for key, old, new in differences(goes_on, said, section.name)
    ]


def _tree(
    cluster: str | None,
    groups: Mapping[str, str | None],
    overrides: Sequence[str],
    started: Path | None = None,
    every: bool = False,
) -> DictConfig:
    """What `compose` makes its configuration of. every: heed all keys of YAMLs for a run that goes on, too."""
    tree = OmegaConf.structured(Config)
    if started is None:
        for addition, origin in _group_yamls({"cluster": cluster, **groups}, overrides):
            tree = _merge(tree, addition, origin)
    else:
        tree = _merge(tree, _saved(started), str(started))
        tree = tree if cluster is None else _moved(tree, cluster, started)
        for addition, origin in (group_yaml(group, choice) for group, choice in groups.items() if choice):
            tree = _merge(tree, addition if every else _fixed(addition), origin)
    for override in overrides:
        tree = _merge(tree, _override(override), f"override {override!r}")
    return tree


def _group_yamls(choices: Mapping[str, str | None], overrides: Sequence[str]) -> list[tuple[DictConfig, str]]:
    """The YAML of each group with its name for messages, in the order of merging.

    choices: by group, in that order. There is no default where a path of data or model is named elsewhere.
    """
    chosen = {group: group_yaml(group, choice) for group, choice in choices.items() if choice}
    _check_kept(choices, chosen)
    given = [addition for addition, _ in chosen.values()]
    for group, default in DEFAULTS.items():
        path = f"{group}.path"  # which clusters and algorithms have not
        if not (group in chosen or _names(path, overrides) or any(_said(addition, path) for addition in given)):
            chosen[group] = group_yaml(group, default)
    return [chosen[group] for group in choices if group in chosen]


def _check_kept(choices: Mapping[str, str | None], chosen: Mapping[str, tuple[DictConfig, str]]) -> None:
    """Raise ConfigError where a later YAML would undo what a group was named for.

    chosen: the YAMLs of the choices and their names, in the order of merging.
    """
    groups = list(chosen)
    for place, group in enumerate(groups):
        key = NAMED_BY.get(group, "")
        named = _said(chosen[group][0], key)
        for addition, origin in [chosen[later] for later in groups[place + 1 :]]:
            if named is not None and (said := _said(addition, key, named)) != named:
                raise ConfigError(
                    f"{group.upper()}={choices[group]} has {key}={named!r}, and {origin}, which comes after it, "
                    f"{said!r}: leave one of them out, or that key out of the file"
                )


def _said(addition: DictConfig, key: str, default: Any = None) -> Any:
    """What a YAML has at section.key, as it is written there."""
    section, _, name = key.partition(".")
    whole: Any = OmegaConf.to_container(addition)
    own = whole.get(section)
    return own.get(name, default) if isinstance(own, dict) else default


def _override(override: str) -> DictConfig:
    """What one override says. Raises ConfigError where it cannot be meant so."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write section.key=value")
    if key == "cluster.name":
        raise ConfigError(f"override {override!r}: the name is that of the profile; CLUSTER= names another")
    if key.startswith(("rewards.", "rewards[")):
        raise ConfigError(
            f"override {override!r}: write the whole list, such as rewards='[{{name: rule}},{{name: ranking}}]'"
        )
    if OCTAL.fullmatch(value.strip()):
        raise ConfigError(
            f"override {override!r}: YAML takes a number that begins with 0 for octal, or for a text; write it "
            "without the 0, or quote it"
        )
    addition = _dotlist(override)
    if key == "rewards" and not (
        OmegaConf.is_list(addition.rewards) and all(isinstance(term, DictConfig) for term in addition.rewards)
    ):
        raise ConfigError(
            f"override {override!r}: write a list of terms, such as rewards='[{{name: rule}},{{name: ranking}}]'"
        )
    return addition


def load(path: Path) -> Config:
    """The resolved configuration of a run. Raises ConfigError naming the file, and the key that it has lost."""
    return _checked(_merge(OmegaConf.structured(Config), _saved(path), str(path)))


def save(config: Config, path: Path) -> None:
    """Write the resolved configuration, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _saved(path: Path) -> DictConfig:
    """What `save` has written; every setting is in it, or it is not what was written."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; there is no run in that folder")
    saved = read_yaml(path)
    for section, keys in (*FIXED_IN_A_RUN.items(), ("", [entry.name for entry in fields(Config)])):
        for key in (f"{section}.{name}".lstrip(".") for name in keys):
            if OmegaConf.select(saved, key, default=saved) is saved:
                raise ConfigError(
                    f"{path}: {key} is missing, so the file is not what the run was started with; bring it back, or "
                    "start another run with NAME="
                )
    return saved


def _fixed(addition: DictConfig) -> DictConfig:
    """Of the YAML of a group, what a run must have in common with its beginning."""
    said: Any = OmegaConf.to_container(addition)
    fixed: dict[str, Any] = {}
    for section, keys in FIXED_IN_A_RUN.items():
        own = said.get(section) if section else said
        kept = {key: own[key] for key in keys if key in own} if isinstance(own, dict) else {}
        fixed |= {section: kept} if section else kept
    return OmegaConf.create(fixed)


def _moved(started: DictConfig, cluster: str, file: Path) -> DictConfig:
    """The configuration of a run that goes on with another profile: what its old one had set gives way to the new one.

    What the run has beyond its old profile stays: FIXED_IN_A_RUN, what its checkpoints are written for, and what its
    data, its model, its algorithm or its overrides had set, but for the devices themselves. file: that of `started`.
    """
    addition, origin = group_yaml("cluster", cluster)
    profile = _merge(OmegaConf.structured(Config), addition, origin)
    if profile.cluster.name == started.cluster.name:
        return started
    try:
        old = _merge(OmegaConf.structured(Config), *group_yaml("cluster", started.cluster.name))
    except ConfigError as error:
        raise ConfigError(
            f"{file}: the run had the profile {started.cluster.name}, whose settings another one is to take the place "
            f"of, and it cannot be read: {error}; bring it back, or leave CLUSTER= out"
        ) from error
    whole: dict[str, Any] = OmegaConf.to_container(started)  # type: ignore[assignment]
    kept = _beyond(whole, OmegaConf.to_container(old))  # type: ignore[arg-type]
    for key in DEVICES:
        kept.get("cluster", {}).pop(key, None)
    for fixed in (FIXED_IN_A_RUN, IN_CHECKPOINTS):
        for section, keys in fixed.items():
            own, into = (whole[section], kept.setdefault(section, {})) if section else (whole, kept)
            into.update({key: own[key] for key in keys})
    return _merge(profile, OmegaConf.create(kept), origin)


def _beyond(mapping: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Of a nested mapping, what another one does not say in the same way."""
    parts = {
        key: _beyond(value, old[key]) if isinstance(value, dict) and isinstance(old.get(key), dict) else value
        for key, value in mapping.items()
        if key not in old or value != old[key]
    }
    return {key: part for key, part in parts.items() if part != {} or mapping[key] == {}}


def _names(path: str, overrides: Sequence[str]) -> bool:
    """Whether an override says where data or a model are, so that the settings of our own do not fit them."""
    places = [text.partition("=")[2] for text in overrides if text.partition("=")[0] == path]
    return bool(places) and places[-1] not in ("", "null", "~")


def _dotlist(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:  # the YAML parser's own classes
        raise ConfigError(f"override {override!r}: the value is not readable as YAML: {error}") from error


def _merge(tree: DictConfig, addition: DictConfig, origin: str) -> DictConfig:
    if key := next(_without_value(OmegaConf.to_container(addition)), None):
        raise ConfigError(f"{origin}: {key} is ???, which stands for no value: give one")
    try:
        return OmegaConf.merge(tree, addition)  # type: ignore[return-value]
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0].replace(NO_LIST, "expected a list, such as [...]")
        raise ConfigError(f"{origin}: {reason}{_place(error)}") from error


def _without_value(said: Any, key: str = "") -> Iterator[str]:
    """Keys at which OmegaConf would leave what was there before."""
    if said == MISSING:
        yield key
    inner = said.items() if isinstance(said, dict) else enumerate(said) if isinstance(said, list) else ()
    for name, value in inner:
        yield from _without_value(value, f"{key}.{name}".lstrip("."))


def _checked(tree: DictConfig) -> Config:
    """The configuration that a tree stands for. Raises ConfigError where it is not one that can be run."""
    config = _object(tree)
    check(config)
    return config


def _object(tree: DictConfig) -> Config:
    try:
        return OmegaConf.to_object(tree)  # type: ignore[return-value]
    except InterpolationResolutionError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{error.full_key}: {reason}; ${{...}} stands for another key, or ${{oc.env:NAME}}"
        ) from error


def _place(error: Exception) -> str:
    """Where in the configuration an error of OmegaConf lies, and the keys there when it is one that is unknown."""
    key, section = getattr(error, "full_key", None), getattr(error, "object_type", None)
    if not key:
        return ""
    if not (isinstance(error, ConfigKeyError) and isinstance(section, type) and is_dataclass(section)):
        return f" (at {key})"
    name = key.rpartition(".")[0] or ("the top level" if section is Config else section.__name__)
    return f" (at {key}; keys of {name}: {', '.join(entry.name for entry in fields(section))})"
