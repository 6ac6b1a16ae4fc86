"""How a configuration comes about: defaults, the YAML of each group, overrides; and how a run keeps it."""

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationResolutionError, OmegaConfBaseException

from catalog.atomic import atomic_file
from launch.config import FIXED_IN_A_RUN, Config, ConfigError, check

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULTS = {"cluster": "local", "data": "embedded", "model": "small", "algorithm": "rere"}
"""The YAML of each group that is taken where none is named."""
DEVICES = ("name", "address", "device", "gpus", "gpus_per_node", "colocate")
"""Keys of `cluster` that say where a run computes."""
IN_CHECKPOINTS = {"learner": ("zero_stage", "dtype"), "rollout": ("dtype",)}
"""Keys that the checkpoints of a run are written for."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.yaml)(?<!\.yml)", re.ASCII)
"""Of a model on the Hugging Face hub: organisation/name."""
NO_LIST = "AnyNode is not a ListConfig, TupleConfig, list, or tuple."
"""OmegaConf's words for a single value where a list is expected."""


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
    hub; an override of data.path or model.path counts as naming one. started: the config.yaml of a run to continue,
    which takes the place of the defaults; with another cluster, see `_moved`. Raises ConfigError naming the file, key
    and value.
    """
    choices = {"cluster": cluster, "data": data, "model": model, "algorithm": algorithm}
    tree = OmegaConf.structured(Config)
    if started is None:
        default = {group: None if _names(group, overrides) else DEFAULTS[group] for group in choices}
        choices = {group: choice or default[group] for group, choice in choices.items()}
    else:
        tree = _merge(tree, _saved(started), str(started))
        tree = tree if cluster is None else _moved(tree, cluster)
        choices["cluster"] = None
    for group, choice in choices.items():
        if choice is not None:
            tree = _merge(tree, *_group(group, choice))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: write section.key=value")
        if key.startswith(("rewards.", "rewards[")):
            raise ConfigError(
                f"override {override!r}: write the whole list, such as rewards='[{{name: rule}},{{name: ranking}}]'"
            )
        addition = _dotlist(override)
        if key == "rewards" and not (
            OmegaConf.is_list(addition.rewards) and all(isinstance(term, DictConfig) for term in addition.rewards)
        ):
            raise ConfigError(
                f"override {override!r}: write a list of terms, such as rewards='[{{name: rule}},{{name: ranking}}]'"
            )
        tree = _merge(tree, addition, f"override {override!r}")
    return _resolved(tree)


def load(path: Path) -> Config:
    """The resolved configuration of a run. Raises ConfigError naming the file, and the key that it has lost."""
    return _resolved(_merge(OmegaConf.structured(Config), _saved(path), str(path)))


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
    saved = _yaml(path)
    for section, keys in (*FIXED_IN_A_RUN.items(), ("", [entry.name for entry in fields(Config)])):
        for key in (f"{section}.{name}".lstrip(".") for name in keys):
            if OmegaConf.select(saved, key, default=saved) is saved:
                raise ConfigError(
                    f"{path}: {key} is missing, so the file is not what the run was started with; bring it back, or "
                    "start another run with NAME="
                )
    return saved


def _moved(started: DictConfig, cluster: str) -> DictConfig:
    """The configuration of a run that goes on with another profile: what its old one had set gives way to the new one.

    What the run has beyond its old profile stays: FIXED_IN_A_RUN, what its checkpoints are written for, and what its
    data, its model, its algorithm or its overrides had set, but for the devices themselves.
    """
    addition, origin = _group("cluster", cluster)
    profile = _merge(OmegaConf.structured(Config), addition, origin)
    if profile.cluster.name == started.cluster.name:
        return started
    old = _merge(OmegaConf.structured(Config), *_group("cluster", started.cluster.name))
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


def _names(group: str, overrides: Sequence[str]) -> bool:
    """Whether an override says where a group's data or model are, so that the settings of our own do not fit them."""
    places = [text.partition("=")[2] for text in overrides if text.partition("=")[0] == f"{group}.path"]
    return bool(places) and places[-1] not in ("", "null", "~")


def _is_packaged(group: str, choice: str) -> bool:
    """Whether one of our own YAMLs bears that name."""
    return Path(choice).name == choice and (CONFIGS / group / f"{choice}.yaml").is_file()


def _group(group: str, choice: str) -> tuple[DictConfig, str]:
    """The YAML of a group and its name for messages; a folder stands for itself in the groups data and model.

    A profile is called as it is found again: by its name among ours, or by the path of its file.
    """
    addition, origin = _found(group, choice)
    if group == "cluster":
        name = choice if _is_packaged(group, choice) else str(Path(choice).resolve())
        addition = OmegaConf.merge(addition, {"cluster": {"name": name}})  # type: ignore[assignment]
    return addition, origin


def _found(group: str, choice: str) -> tuple[DictConfig, str]:
    if _is_packaged(group, choice):
        path = CONFIGS / group / f"{choice}.yaml"
        return _yaml(path), str(path.relative_to(CONFIGS.parent))
    if choice.endswith((".yaml", ".yml")) and Path(choice).is_file():
        return _yaml(Path(choice)), choice
    names = f"one of configs/{group}: {', '.join(sorted(file.stem for file in (CONFIGS / group).glob('*.yaml')))}"
    if group in ("data", "model"):
        if Path(choice).is_dir():
            return OmegaConf.create({group: {"path": choice}}), f"{group.upper()}={choice}"
        if group == "model" and HUB_NAME.fullmatch(choice):
            return OmegaConf.create({"model": {"path": choice}}), f"MODEL={choice}"
        hub = " nor organisation/name of the Hugging Face hub" if group == "model" else ""
        raise ConfigError(f"{group.upper()}={choice}: neither a folder nor a YAML file nor {names}{hub}")
    raise ConfigError(f"{group.upper()}={choice}: neither a YAML file nor {names}")


def _yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # the YAML parser's own classes
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must hold a mapping of sections")
    return loaded


def _dotlist(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:  # the YAML parser's own classes
        raise ConfigError(f"override {override!r}: the value is not readable as YAML: {error}") from error


def _merge(tree: DictConfig, addition: DictConfig, origin: str) -> DictConfig:
    try:
        return OmegaConf.merge(tree, addition)  # type: ignore[return-value]
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0].replace(NO_LIST, "expected a list, such as [...]")
        raise ConfigError(f"{origin}: {reason}{_place(error)}") from error


def _resolved(tree: DictConfig) -> Config:
    """The configuration that a tree stands for, checked."""
    try:
        config: Config = OmegaConf.to_object(tree)  # type: ignore[assignment]
    except InterpolationResolutionError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{error.full_key}: {reason}; ${{...}} stands for another key, or ${{oc.env:NAME}}"
        ) from error
    check(config)
    return config


def _place(error: Exception) -> str:
    """Where in the configuration an error of OmegaConf lies, and the keys there when it is one that is unknown."""
    key, section = getattr(error, "full_key", None), getattr(error, "object_type", None)
    if not key:
        return ""
    if not (isinstance(error, ConfigKeyError) and isinstance(section, type) and is_dataclass(section)):
        return f" (at {key})"
    name = key.rpartition(".")[0] or ("the top level" if section is Config else section.__name__)
    return f" (at {key}; keys of {name}: {', '.join(entry.name for entry in fields(section))})"
