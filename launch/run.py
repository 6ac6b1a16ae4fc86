"""One whole run: catalogue, warm-up, evaluation, training, evaluation, report."""

from pathlib import Path
from typing import Any

import numpy as np

from catalog.build import build_catalog
from catalog.catalog import Catalog
from catalog.metrics import ndcg_per_example, paired_bootstrap, ranking_metrics
from launch.checkpoints import latest_step
from launch.config import Config
from launch.data_order import DataOrder
from launch.evaluate import eval_examples, evaluate
from launch.fleet import Fleet, LearnerLost
from launch.model import prepare_model
from launch.placement import plan
from launch.progress import Progress
from launch.report import print_metrics, write_report
from launch.run_directory import RunDirectory, versions
from launch.train import train


def run(config: Config, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train as `config` says and return the summary; what it leaves is described in RunDirectory.

    Raises before anything heavy starts where a fault can be known: configuration, data, model, devices.
    """
    progress = Progress()
    placement = plan(config)
    with progress.stage("catalogue") as stage:
        model_path = prepare_model(config)
        catalog = build_catalog(config.data, str(model_path))
        stage.update(detail=f"{catalog.num_classes} titles, {len(catalog.examples('train'))} training examples")
    order = DataOrder(len(catalog.examples("train")), config.train.prompts_per_step, config.train.seed)
    steps = config.train.steps if config.train.steps is not None else order.steps_in(config.train.epochs)

    directory = RunDirectory(config, resume=resume, overwrite=overwrite)
    with Fleet(config, placement, catalog, model_path, total_steps=steps, progress=progress) as fleet:
        warm_up(fleet, directory, progress)
        before = baseline(fleet, catalog, directory, progress)
        train_to_the_end(fleet, order, directory, progress, steps)
        after = evaluate(fleet, catalog, eval_examples(config, catalog), "RL", progress)
        summary = summarise(config, catalog, directory, before, after, fleet, steps)
    directory.write_json("summary.json", summary)
    write_report(directory, config, summary)
    print_metrics(progress, summary)
    progress.line(f"{directory.path}/summary.json, report.html, metrics.jsonl, tensorboard/, checkpoints/")
    directory.close()
    return summary
