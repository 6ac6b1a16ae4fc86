"""The training loop: draw prompts, roll out, reward, learn, sync."""

from collections import deque

from launch.data_order import DataOrder
from launch.fleet import Fleet
from launch.progress import Stage
from launch.run_directory import RunDirectory


def train(fleet: Fleet, order: DataOrder, run: RunDirectory, stage: Stage, *, first: int, steps: int) -> None:
    """Steps first..steps - 1 of ReRe. The policy version equals the number of steps done.

    With train.staleness k, the groups of up to k later steps are rolled out while a step is learned, and so with
    weights that are at most k versions old; k = 0 is the paper.
    """
    config = fleet.config.train
    ahead: deque = deque()
    launched = first
    for step in range(first, steps):
        while launched < min(steps, step + 1 + config.staleness):
            ahead.append(fleet.roll_out(order[launched], policy_version=step))
            launched += 1
        groups = fleet.reward(ahead.popleft())
        metrics = fleet.learn(groups)
        fleet.sync(policy_version=step + 1)

        run.log("train", step + 1, metrics | fleet.timings())
        stage.update(step + 1, _words(metrics, fleet.step_seconds))
        if (step + 1) % config.rollouts_every == 0:
            run.save_rollouts(step + 1, fleet.readable(groups))
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps:
            fleet.save_checkpoint(run.checkpoints / f"step-{step + 1}", {"step": step + 1})


def _words(metrics: dict[str, float], seconds: float) -> str:
    return (
        f"reward {metrics['reward']:+.3f}  hit {metrics['groups_with_hit']:.0%}  loss {metrics['loss']:+.4f}  "
        f"kl {metrics['kl']:.2e}  {seconds:.2f} s/step"
    )
