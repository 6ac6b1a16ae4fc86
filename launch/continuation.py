"""What a run may do in another way than the one that it continues, or whose checkpoint it starts from."""

from dataclasses import fields, replace
from pathlib import Path
from reprlib import repr as shortened

from launch.compose import load
from launch.config import FIXED_IN_A_RUN, Config, ConfigError
from launch.differences import differences
from rewards.config import RewardTerm

TELLING = ("data.template", "learner.optimizer", "train.prompts_per_step")
"""What a run seldom does in another way, by intention, than the run whose checkpoint it starts from."""


def check_resumable(config: Config, saved: Config) -> None:
    """Raise ConfigError naming what differs between a run and the configuration that is to continue it.

    Machines, rollout workers, ranks and the number of steps may change; data, model, algorithm and batch may not.
    """
    saved, config = _without_places(saved), _without_places(config)
    for section, keys in FIXED_IN_A_RUN.items():
        for key in keys:
            name = f"{section}.{key}" if section else key
            for changed, old, new in differences(saved, config, name):
                raise ConfigError(
                    f"{changed} is {new!r}, but the run was started with {old!r}; resume with the same, or use NAME="
                )


def changes(saved: Config, config: Config) -> list[str]:
    """What a continued run does in another way than it was started, a line for each key."""
    names = [name.name for name in fields(Config) if name.name not in ("name", "runs")]
    found = (difference for name in names for difference in differences(saved, config, name))
    return [f"{key}: {old!r} until now, {new!r} from now on" for key, old, new in found]


def since_its_checkpoint(config: Config) -> list[str]:
    """Where MODEL= is a checkpoint of a run, notes on what TELLING was there: a folder brings weights, no settings."""
    path = Path(config.model.path or "").resolve()
    saved = path.parent.parent / "config.yaml"
    if path.parent.name != "checkpoints" or not saved.is_file():
        return []
    try:
        before = load(saved)
    except ConfigError:  # of another trainer, or of another version of this one
        return []
    found = (difference for name in TELLING for difference in differences(before, config, name))
    return [
        f"note: {key} is {shortened(new)}; it was {shortened(old)} in run {saved.parent.name}, from whose checkpoint "
        "this one starts"
        for key, old, new in found
    ]


def _without_places(config: Config) -> Config:
    """A configuration without what only says where something is computed or kept."""
    rewards = [RewardTerm(term.name, term.weight, term.label, term.args) for term in config.rewards]
    return replace(config, data=replace(config.data, cache=""), rewards=rewards)
