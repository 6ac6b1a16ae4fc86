"""What `DRY_RUN=1` prints: placement, batch arithmetic and the resolved configuration, without starting anything."""

from catalog.catalog import Catalog
from launch.config import Config, to_yaml
from launch.data_order import DataOrder
from launch.placement import plan
from learner.arithmetic import BatchArithmetic, describe_batch


def dry_run(config: Config) -> None:
    """Print everything that is known before a run; raises what a run would raise this early."""
    placement = plan(config)
    print(f"# placement: {config.cluster.name}, Ray at {config.cluster.address}")
    for line in placement.lines():
        print(f"#   {line}")
    print(f"#   weights to rollout workers: object store, after every step; staleness {config.train.staleness}")
    print("# batch")
    prompts, candidates = config.train.prompts_per_step, config.rollout.group_size
    print(f"#   {prompts} prompts x {candidates} candidates = {prompts * candidates} completions per step")
    print(f"#   {-(-prompts // config.learner.ranks)} prompts per learner rank, micro-batches of up to ", end="")
    print(f"{config.learner.micro_batch_tokens} packed tokens")
    print("# resolved configuration")
    print(to_yaml(config), end="")


def batch_arithmetic(config: Config, catalog: Catalog, steps: int) -> BatchArithmetic:
    """The batch arithmetic of a run whose catalogue is known. Raises BatchError naming the keys that do not fit."""
    return describe_batch(
        config.learner,
        prompts_per_step=config.train.prompts_per_step,
        group_size=config.rollout.group_size,
        steps=steps,
        train_examples=len(catalog.examples("train")),
        prompt_tokens=int(catalog.stats["prompt_tokens"]["max"]),
        title_tokens=int(catalog.trie.max_tokens),
    )


def data_order(config: Config, catalog: Catalog) -> tuple[DataOrder, int]:
    """The order of training examples and the number of steps."""
    order = DataOrder(len(catalog.examples("train")), config.train.prompts_per_step, config.train.seed)
    return order, config.train.steps if config.train.steps is not None else order.steps_in(config.train.epochs)
