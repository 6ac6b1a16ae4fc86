"""One whole run: catalogue, SFT, evaluation, training, evaluation, report."""

import shlex
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from catalog.build import build_catalog
from catalog.catalog import Catalog
from catalog.metrics import ndcg_per_example, paired_bootstrap, ranking_metrics
from launch.actors import Actors
from launch.compose import load
from launch.config import Config
from launch.continuation import changes, since_its_checkpoint
from launch.data_order import DataOrder
from launch.evaluate import eval_examples, evaluate
from launch.idle_keys import idle_keys
from launch.learner_gang import LearnerLost
from launch.model import prepare_model
from launch.model_folder import architecture, parameters
from launch.placement import Placement, check_this_machine
from launch.preflight import check_config, plan_steps
from launch.progress import Progress, Stage
from launch.report import before, print_metrics, write_report
from launch.run_directory import RunDirectory, in_use, versions
from launch.train import train
from launch.trial import trial
from learner import checkpoint
from rollout.restarts import DataLost, check_ray

GANG_RESTARTS = 3
"""Of the learner ranks, while they start, in the trial of the weights, SFT, training and evaluation each."""
EVALUATION = ("example_ids", "hit_ranks", "invalid", "metrics")
"""What eval-sft.json and eval-rl.json hold."""
T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """What the phases of a run share, once its actors are up and its directory is there."""

    config: Config
    catalog: Catalog
    directory: RunDirectory
    actors: Actors
    progress: Progress


def run(config: Config, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train as `config` says and return the summary; what it leaves is described in RunDirectory.

    Raises before anything heavy starts where a fault can be known: configuration, rewards, devices, data, model. A run
    of the same name is replaced (overwrite) when all actors are up and hold the first weights.
    """
    placement = check_config(config)
    check_this_machine(config, placement)
    RunDirectory.check(config, resume=resume, overwrite=overwrite)
    with in_use(config):
        return _run(config, placement, resume, overwrite)


def _run(config: Config, placement: Placement, resume: bool, overwrite: bool) -> dict[str, Any]:
    progress = Progress()
    if resume:
        for line in changes(load(Path(config.runs) / config.name / "config.yaml"), config):
            progress.line(line)
        if _newest(checkpoints := Path(config.runs) / config.name / "checkpoints") is None:
            progress.line(f"note: {checkpoints} holds no checkpoint: the run starts from its beginning")
    with progress.stage("catalogue") as stage:
        stage.update(detail="the model and its tokenizer")
        model_path = prepare_model(config)
        catalog = build_catalog(config.data, str(model_path), lambda words: stage.update(detail=words))
        stage.update(detail=_catalog_words(catalog))
    for line in _model_words(config, model_path):
        progress.line(line)
    if resume:
        RunDirectory.check_catalogue(config, catalog.fingerprint)
    order, steps, batch = plan_steps(config, catalog, model_path)
    if resume:
        RunDirectory.check_steps(config, steps)
    for line in (*batch.lines(), *idle_keys(config)):
        progress.line(line)
    with ExitStack() as opened, Actors(config, placement, catalog, model_path, steps) as actors:  # checks its devices
        progress.line(f"what rewards and other actors print: {actors.logs}/worker-*")
        start(actors, config, model_path, progress)
        directory = RunDirectory(config, catalog.fingerprint, resume=resume, overwrite=overwrite, say=progress.line)
        opened.callback(directory.close)
        opened.push(partial(_tell_how_to_go_on, config, directory))
        session = Session(config, catalog, directory, actors, progress)
        sft = surviving(actors, progress, partial(fine_tune, session))
        with progress.stage("train", steps) as stage:
            surviving(actors, progress, partial(train_to_the_end, session, order, stage, steps))
        rl = surviving(actors, progress, partial(final_evaluation, session))
        confirmed_loads = actors.rollouts.confirmed_loads
    summary = summarise(config, catalog, directory, sft, rl, steps, confirmed_loads)
    directory.write_json("summary.json", summary)
    write_report(directory, config, summary, catalog)
    print_metrics(progress, config, summary)
    progress.line(f"{directory.path}: report.html, summary.json, metrics.jsonl, tensorboard, rollouts, checkpoints")
    return summary


def start(actors: Actors, config: Config, model_path: Path, progress: Progress) -> None:
    """Wait until all actors are up, and try what only shows when they run; say which of it is being waited for."""
    with progress.stage("start") as stage:
        stage.update(detail="waiting for rewards")  # first, since they are up first, and their faults too
        actors.rewards.ready(config.cluster.start_timeout_s)
        stage.update(detail="waiting for learner ranks")
        surviving(actors, progress, actors.learner.join)
        stage.update(detail="waiting for rollout workers")
        actors.rollouts.ready(config.cluster.start_timeout_s)
        stage.update(detail="trying weights, the longest prompts and rewards")
        surviving(actors, progress, partial(trial, actors, config, model_path))
        stage.update(detail="all actors are up and agree")


def _tell_how_to_go_on(
    config: Config,
    directory: RunDirectory,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    """Add to whatever ends a run that it can be continued."""
    newest = _newest(directory.checkpoints)
    if error is not None and newest is not None and not isinstance(error, checkpoint.CheckpointError):
        runs, cluster = directory.path.parent, config.cluster
        words = ["RESUME=1", f"NAME={shlex.quote(directory.path.name)}"]
        words += [f"CLUSTER={shlex.quote(cluster.name)}"] if cluster.device == "gpu" else []  # as the environment is
        words += [f"ARGS={shlex.quote(f'runs={shlex.quote(str(runs))}')}"] if runs != Path(Config().runs) else []
        error.add_note(f"{' '.join(words)} goes on from {newest}")


def _newest(checkpoints: Path) -> Path | None:
    """Where a run goes on: its newest checkpoint, or an epoch of SFT."""
    sft = checkpoints.parent / checkpoint.SFT
    return checkpoint.newest(checkpoints) or (sft if (sft / checkpoint.SFT_PROGRESS).is_file() else None)


def fine_tune(session: Session) -> dict[str, Any]:
    """SFT, its weights to the rollout workers as version 0, and the test metrics before RL; done once per run."""
    learner, directory, epochs = session.actors.learner, session.directory, session.config.learner.sft.epochs
    sft = directory.checkpoints / checkpoint.SFT
    if checkpoint.latest(directory.checkpoints) is not None and directory.has("eval-sft.json"):
        pass  # `restore` loads what came after
    elif epochs and not sft.is_dir():
        with session.progress.stage("SFT", epochs) as stage:
            for report in learner.sft(directory.path / checkpoint.SFT):
                done = int(report["epoch"]) - ("valid_loss" not in report)
                stage.update(done, sft_words(report))
                if "valid_loss" in report:
                    directory.log("sft", int(report["epoch"]), report)
            learner.save(sft, {"steps_done": 0})
    elif sft.is_dir():
        learner.load(sft)
    shutil.rmtree(directory.path / checkpoint.SFT, ignore_errors=True)  # the epochs that led to that checkpoint
    return evaluation(session, "sft", version=0)


def sft_words(report: dict[str, float]) -> str:
    """How far an epoch of SFT is, or that it is over, and its losses."""
    far = [f"update {report['update']:.0f}/{report['updates']:.0f}"] if "update" in report else []
    return "  ".join(far + [f"{name} {report[name]:.4f}" for name in ("loss", "valid_loss") if name in report])


def train_to_the_end(session: Session, order: DataOrder, stage: Stage, steps: int) -> None:
    """All steps that are still to be done after the newest checkpoint."""
    config, actors, directory = session.config, session.actors, session.directory

    def validate() -> dict[str, float]:
        ranks, _ = evaluate(actors.rollouts, config, "valid", eval_examples(config, session.catalog, "valid"))
        return ranking_metrics(ranks, config.train.eval_ks)

    first = restore(session)
    directory.go_on_after(first)
    if (best := directory.unkept_best()) is not None:
        actors.learner.save(directory.best, best)
    stage.update(first)
    train(actors, order, config.train, directory, stage, validate, first=first, steps=steps)


def surviving(actors: Actors, progress: Progress, work: Callable[[], T]) -> T:
    """The result of `work`, called again after a rank or data were lost: it goes on from what is on disk."""
    restarts = 0
    while True:
        try:
            actors.learner.join()
            return work()
        except (LearnerLost, DataLost) as lost:
            if restarts == GANG_RESTARTS:
                raise
            check_ray()
            restarts += 1
            progress.line(f"{lost}; starting all ranks again ({restarts} of {GANG_RESTARTS} times at most)")
        actors.rollouts.abandon()
        actors.learner.restart()


def restore(session: Session) -> int:
    """Bring learner and workers to the newest checkpoint, or to the weights before RL; returns the steps done."""
    actors, directory = session.actors, session.directory
    latest = checkpoint.latest(directory.checkpoints)
    sft = directory.checkpoints / checkpoint.SFT
    first = 0
    if latest is not None:
        first = int(actors.learner.load(latest)["steps_done"])
    elif sft.is_dir():
        actors.learner.load(sft)
    if actors.rollouts.version != first:
        actors.rollouts.publish(actors.learner.export, version=first)
        actors.rollouts.loaded()
    return first


def final_evaluation(session: Session) -> dict[str, Any]:
    """The test metrics of the newest checkpoint, which the workers hold already unless something was lost."""
    restore(session)
    return evaluation(session, "rl")


def evaluation(session: Session, phase: str, version: int | None = None) -> dict[str, Any]:
    """Hit ranks of the current weights on the test split, kept as eval-<phase>.json.

    Those before RL ("sft") are read from there when it exists, since later weights cannot give them any more.
    version: publish the learner's weights under it first; None: the workers hold them.
    """
    config, directory, rollouts = session.config, session.directory, session.actors.rollouts
    file = f"eval-{phase}.json"
    if directory.has(file) and phase == "sft":
        return directory.read_json(file, *EVALUATION)
    example_ids = eval_examples(config, session.catalog, "test")
    called = before(config) if phase == "sft" else "RL"
    with session.progress.stage(f"evaluate {called}", len(example_ids)) as stage:
        if version is not None:
            rollouts.publish(session.actors.learner.export, version)
        ranks, invalid = evaluate(rollouts, config, "test", example_ids, stage)
        metrics = ranking_metrics(ranks, config.train.eval_ks)
        k = max(config.train.eval_ks)
        stage.update(detail=f"NDCG@{k} {metrics[f'ndcg@{k}']:.4f}")
    directory.log("test", rollouts.version or 0, metrics)
    found = example_ids.tolist(), ranks.tolist(), invalid, metrics
    result = dict(zip(EVALUATION, found, strict=True))
    directory.write_json(file, result)
    return result


def summarise(
    config: Config,
    catalog: Catalog,
    directory: RunDirectory,
    sft: dict[str, Any],
    rl: dict[str, Any],
    steps: int,
    confirmed_loads: int,
) -> dict[str, Any]:
    """The content of summary.json. sft, rl: what `evaluation` found before and after RL. confirmed_loads: see
    RolloutFleet."""
    logged, test, k = directory.metrics("train", steps), catalog.examples("test"), max(config.train.eval_ks)
    last = checkpoint.newest(directory.checkpoints)
    stages = ("rollout", "reward", "learn", "sync", "step")
    return {
        "name": config.name,
        "data": config.data.path or "embedded",
        "model": config.model.path or "small",
        "catalogue": catalog.fingerprint,
        "checkpoint": None if last is None else str(last),
        "evaluated": len(sft["example_ids"]),
        "test_examples": len(test),
        "steps": steps,
        "groups": steps * config.train.prompts_per_step,
        "invalid_candidates": int(sft["invalid"] + rl["invalid"] + sum(line["invalid_candidates"] for line in logged)),
        "metrics": {
            "sft": sft["metrics"],
            "rl": rl["metrics"],
            "best_possible": best_possible(config, catalog, np.array(sft["example_ids"])),
        },
        f"ndcg@{k}_gain": paired_bootstrap(
            ndcg_per_example(np.array(sft["hit_ranks"]), k),
            ndcg_per_example(np.array(rl["hit_ranks"]), k),
            [test.user_id(example_id) for example_id in sft["example_ids"]],
            seed=0,
        ),
        "timing_s": {
            stage: float(np.mean([line[f"timing_s/{stage}"] for line in logged])) if logged else 0.0
            for stage in stages
        },
        "weights_checksum_ok": confirmed_loads > 0,  # a mismatch has ended the run with both values
        "confirmed_weight_loads": confirmed_loads,
        "versions": versions(),
    }


def best_possible(config: Config, catalog: Catalog, example_ids: np.ndarray) -> dict[str, float] | None:
    """Metrics of ranking by the true probabilities on the evaluated examples; None where they are unknown."""
    ranks = catalog.examples("test").best_rank
    return None if ranks is None else ranking_metrics(ranks[example_ids], config.train.eval_ks)


def _model_words(config: Config, model_path: Path) -> list[str]:
    """What is trained, and where that is written."""
    millions = parameters(model_path) / 1e6
    size = f", {millions:.3g} million parameters" if millions else ""
    lines = [
        f"model: {architecture(model_path)}{size} of {config.model.path or 'random weights'}, {config.learner.dtype}; "
        f"run: {Path(config.runs) / config.name}"
    ]
    if config.model.path is None and config.data.path is not None:
        lines.append("note: without MODEL= a small model from random weights is trained, to try things out")
    return lines + since_its_checkpoint(config)


def _catalog_words(catalog: Catalog) -> str:
    stats = catalog.stats
    cut = stats["truncated_prompts"]
    return (
        f"{stats['items']} items, {stats['classes']} titles, {stats['examples']['train']} training examples, "
        f"{stats['trie']['nodes']} trie nodes" + (f", {cut} prompts cut to data.max_prompt_tokens" if cut else "")
    )
