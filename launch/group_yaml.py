"""The YAML of each group of settings, by its name among ours, its path, or what stands for it."""

import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from launch.config import ConfigError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.yaml)(?<!\.yml)", re.ASCII)
"""Of a model on the Hugging Face hub: organisation/name."""


def _is_packaged(group: str, choice: str) -> bool:
    """Whether one of our own YAMLs bears that name."""
    return Path(choice).name == choice and (CONFIGS / group / f"{choice}.yaml").is_file()


def group_yaml(group: str, choice: str) -> tuple[DictConfig, str]:
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
        return read_yaml(path), str(path.relative_to(CONFIGS.parent))
    if choice.endswith((".yaml", ".yml")) and Path(choice).is_file():
        return read_yaml(Path(choice)), choice
    names = f"one of configs/{group}: {', '.join(sorted(file.stem for file in (CONFIGS / group).glob('*.yaml')))}"
    if group in ("data", "model"):
        if Path(choice).is_dir():
            return OmegaConf.create({group: {"path": choice}}), f"{group.upper()}={choice}"
        if group == "model" and HUB_NAME.fullmatch(choice):
            return OmegaConf.create({"model": {"path": choice}}), f"MODEL={choice}"
        hub = " nor organisation/name of the Hugging Face hub" if group == "model" else ""
        raise ConfigError(f"{group.upper()}={choice}: neither a folder nor a YAML file nor {names}{hub}")
    raise ConfigError(f"{group.upper()}={choice}: neither a YAML file nor {names}")


def read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # the YAML parser's own classes
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must hold a mapping of sections")
    return loaded
