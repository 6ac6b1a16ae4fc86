"""How a configuration comes about: defaults, the YAML of each group, overrides; and how a run keeps it."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from catalog.atomic import atomic_file
from launch.config import FIXED_IN_A_RUN, Config, ConfigError, check

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULTS = {"cluster": "local", "data": "embedded", "model": "small", "algorithm": "rere"}
"""The YAML of each group that is taken where none is named."""
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

    data and model are the name of a YAML or a folder. started: the config.yaml of a run to continue, which takes the
    place of the defaults; with another cluster, all but what belongs to machines. Raises ConfigError naming the file,
    key and value.
    """
    choices = {"cluster": cluster, "data": data, "model": model, "algorithm": algorithm}
    tree = OmegaConf.structured(Config)
    if started is None:
        choices = {group: choice or DEFAULTS[group] for group, choice in choices.items()}
    elif cluster is None:
        tree = _merge(tree, _saved(started), str(started))
    else:
        tree = _merge(tree, *_group("cluster", cluster))
        tree = _merge(tree, _without_machines(_saved(started)), str(started))
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
    config: Config = OmegaConf.to_object(tree)  # type: ignore[assignment]
    check(config)
    return config


def load(path: Path) -> Config:
    """The resolved configuration of a run. Raises ConfigError naming the file, and the key that it has lost."""
    config: Config = OmegaConf.to_object(  # type: ignore[assignment]
        _merge(OmegaConf.structured(Config), _saved(path), str(path))
    )
    check(config)
    return config


def save(config: Config, path: Path) -> None:
    """Write the resolved configuration, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(to_yaml(config))


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


def _without_machines(started: DictConfig) -> DictConfig:
    """Of a saved configuration, what does not depend on where it ran: `train` and FIXED_IN_A_RUN."""
    kept: dict[str, Any] = {"train": started.get("train", {})}
    for section, keys in FIXED_IN_A_RUN.items():
        own = started.get(section, {}) if section else started
        into = kept.setdefault(section, {}) if section else kept
        into.update({key: own[key] for key in keys if key in own})
    return OmegaConf.create(kept)


def _group(group: str, choice: str) -> tuple[DictConfig, str]:
    """The YAML of a group and its name for messages; a folder stands for itself in the groups data and model."""
    path = CONFIGS / group / f"{choice}.yaml"
    if path.is_file():
        return _yaml(path), str(path.relative_to(CONFIGS.parent))
    names = ", ".join(sorted(file.stem for file in (CONFIGS / group).glob("*.yaml")))
    if group in ("data", "model"):
        if Path(choice).is_dir():
            return OmegaConf.create({group: {"path": choice}}), f"{group.upper()}={choice}"
        hub = '; a model of the Hugging Face hub is ARGS="model.path=organisation/name"' if group == "model" else ""
        raise ConfigError(f"{group.upper()}={choice}: neither a folder nor one of configs/{group}: {names}{hub}")
    raise ConfigError(f"{group.upper()}={choice}: not one of configs/{group}: {names}")


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


def _place(error: Exception) -> str:
    """Where in the configuration an error of OmegaConf lies, and the keys there when it is one that is unknown."""
    key, section = getattr(error, "full_key", None), getattr(error, "object_type", None)
    if not key:
        return ""
    if not (isinstance(error, ConfigKeyError) and isinstance(section, type) and is_dataclass(section)):
        return f" (at {key})"
    name = key.rpartition(".")[0] or ("the top level" if section is Config else section.__name__)
    return f" (at {key}; keys of {name}: {', '.join(entry.name for entry in fields(section))})"
