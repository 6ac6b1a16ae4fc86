"""What `DRY_RUN=1` prints: placement, batch arithmetic and the resolved configuration, without starting anything."""

from pathlib import Path

from catalog.build import find_catalog
from launch.compose import load, to_yaml
from launch.config import Config
from launch.continuation import changes, since_its_checkpoint
from launch.idle_keys import idle_keys
from launch.model import find_model
from launch.preflight import check_config, plan_steps
from launch.run_directory import RunDirectory
from learner.arithmetic import batch_notes


def dry_run(config: Config, *, resume: bool = False, overwrite: bool = False) -> None:
    """Print everything that is known before a run; raises what a run would raise this early."""
    placement = check_config(config)
    taken = None if resume or overwrite else RunDirectory.name_is_taken(config)
    if taken is None:
        RunDirectory.check(config, resume=resume, overwrite=overwrite)
    if resume:
        for line in changes(load(Path(config.runs) / config.name / "config.yaml"), config):
            print(f"# {line}")
    print(f"# placement: {config.cluster.name}, Ray at {config.cluster.address}")
    for line in placement.lines():
        print(f"#   {line}")
    print(f"#   weights to rollout workers: object store, after every step; staleness {config.train.staleness}")
    if config.model.path is not None and not Path(config.model.path).is_dir():
        print(f"# model: there is no folder {config.model.path}; the Hugging Face hub will be asked for it")
    for line in since_its_checkpoint(config):
        print(f"# {line}")
    print("# batch")
    for line in (*batch_lines(config, resume), *idle_keys(config)):
        print(f"#   {line}")
    if taken is not None:
        print(f"# {taken}")
    print("# resolved configuration")
    print(to_yaml(config), end="")


def batch_lines(config: Config, resume: bool = False) -> list[str]:
    """The batch arithmetic, as far as it is known without building a catalogue or making a model.

    Raises ConfigError where a run that is to be resumed has another catalogue, or has done more steps.
    """
    model_path = find_model(config)
    catalog = None if model_path is None else find_catalog(config.data, str(model_path))
    if model_path is None or catalog is None:
        prompts, group_size = config.train.prompts_per_step, config.rollout.group_size
        return [
            f"RL: {prompts} prompts -> {prompts * group_size} candidates per step; steps, micro-batches and whether "
            "the longest prompt fits are known when a run has built the catalogue",
            *batch_notes(config.learner),
        ]
    if resume:
        RunDirectory.check_catalogue(config, catalog.fingerprint)
    _, steps, batch = plan_steps(config, catalog, model_path)
    if resume:
        RunDirectory.check_steps(config, steps)
    return [f"{steps} steps", *batch.lines()]
