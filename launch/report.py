"""What a run leaves for people: the table at its end and report.html."""

import base64
import html
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from catalog.atomic import atomic_file
from catalog.catalog import Catalog
from catalog.visible import visible
from launch.compose import to_yaml
from launch.config import Config, ConfigError
from launch.progress import Progress
from launch.run_directory import RunDirectory

CURVES = (
    ("groups_with_hit", "share of groups with a hit"),
    ("reward", "mean reward of the candidates"),
    ("loss", "loss"),
    ("kl", "KL to the reference"),
    ("rollout/group_probability", "probability that the policy gives to a group's candidates"),
    ("grad_norm", "gradient norm before clipping"),
    ("mismatch", "mean |rollout - learner| log-probability of a candidate"),
)
GROUPS_SHOWN, CANDIDATES_SHOWN, HISTORY_SHOWN = 6, 5, 5
CURVES_EXPLAINED = "Pale: every step. Dark: the mean over the last tenth of the steps; of a validation, its value."


def before(config: Config) -> str:
    """What the model before RL is called."""
    return "SFT" if config.learner.sft.epochs else "before"


def print_metrics(progress: Progress, config: Config, summary: dict[str, Any]) -> None:
    """The table at the end of a run: before RL, RL, the gain, and the best possible where it is known."""
    progress.table(f"{summary['name']}: {_evaluated(summary)}", *_metric_table(config, summary))
    progress.line(_gain(config, summary))


def write_report(run: RunDirectory, config: Config, summary: dict[str, Any], catalog: Catalog) -> None:
    """report.html: figures, curves, some of what was generated and the configuration on one self-contained page."""
    columns, rows = _metric_table(config, summary)
    timing = [[stage, f"{seconds:.3f}"] for stage, seconds in summary["timing_s"].items()]
    steps = run.metrics("train", summary["steps"])
    k = max(config.train.eval_ks)
    valid = run.metrics("valid", summary["steps"])
    curves = "".join(
        f"<figure><img alt='{_html(title)}' src='{_curve(logged, name)}'>"
        f"<figcaption>{_html(title)}</figcaption></figure>"
        for logged, name, title in (
            (valid, f"ndcg@{k}", f"NDCG@{k} on the validation split"),
            *((steps, name, title) for name, title in CURVES),
        )
        if any(name in step for step in logged)
    )
    title = _html(summary["name"])
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }}
table {{ display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0 }}
th, td {{ padding: .25rem .8rem; border-bottom: 1px solid #d0d7de; text-align: right }}
th:first-child, td:first-child {{ text-align: left }} td {{ font-variant-numeric: tabular-nums }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem }}
figure {{ margin: 0 }} figure img {{ width: 100% }} figcaption {{ color: #57606a; font-size: .9rem }}
.group {{ margin: 1.5rem 0 }} .group p {{ margin: 0 }} .group th, .group td {{ text-align: left }}
.group th:nth-child(n + 3), .group td:nth-child(n + 3) {{ text-align: right }}
h1, p, .group td:nth-child(2) {{ overflow-wrap: anywhere }} .group td:nth-child(2) {{ min-width: 14rem }}
h2, h2 + p {{ break-after: avoid }} figure, .group {{ break-inside: avoid }}
@media (max-width: 40rem) {{
 th, td {{ padding: .25rem .35rem }} .group table {{ font-size: .85rem }} .group td:nth-child(2) {{ min-width: 8rem }}
}}
pre {{ background: #f6f8fa; padding: 1rem; overflow-x: auto; font-size: .85rem }}
</style></head><body>
<h1>{title}</h1>
<p>{_html(summary["data"])} · {_html(summary["model"])} · {_html(config.learner.objective)} ·
{_html(config.rollout.strategy)} of {config.rollout.group_size} · {summary["steps"]:,} steps ·
{summary["groups"]:,} groups · {summary["invalid_candidates"]} invalid candidates</p>
<h2>Test metrics</h2><p><b>{_gain(config, summary)}</b></p><p>{_evaluated(summary)}</p>{_html_table(columns, rows)}
<h2>Mean seconds per step</h2>{_html_table(["stage", "seconds"], timing)}
{f'<h2>Curves</h2><p>{CURVES_EXPLAINED}</p><div class="curves">{curves}</div>' if curves else ""}
{_generated(run, summary["steps"], catalog)}
<h2>Configuration</h2><pre>{html.escape(to_yaml(config))}</pre>
</body></html>
"""
    with atomic_file(run.path / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _evaluated(summary: dict[str, Any]) -> str:
    return f"metrics of {summary['evaluated']:,} of {summary['test_examples']:,} test examples"


def _metric_table(config: Config, summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    metrics = summary["metrics"]
    columns = ["metric", before(config), "RL", "gain"] + (["best possible"] if metrics["best_possible"] else [])
    rows = []
    for name, old in metrics["sft"].items():
        new = metrics["rl"][name]
        row = [name.upper(), f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}"]
        rows.append(row + ([f"{metrics['best_possible'][name]:.4f}"] if metrics["best_possible"] else []))
    return columns, rows


def _gain(config: Config, summary: dict[str, Any]) -> str:
    k = max(config.train.eval_ks)
    gain = summary[f"ndcg@{k}_gain"]
    interval = "no interval: all examples are of one user"
    if gain["low"] is not None:
        interval = f"95% interval {gain['low']:+.4f} to {gain['high']:+.4f}, paired bootstrap over users"
        interval += "; it includes 0" if gain["low"] <= 0 <= gain["high"] else ""
    over = "SFT" if config.learner.sft.epochs else "the model before"
    return f"NDCG@{k} gain of RL over {over}: {gain['mean']:+.4f}  ({interval})"


def _html(text: str) -> str:
    return html.escape(visible(text))


def _html_table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{_html(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_html(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _generated(run: RunDirectory, steps: int, catalog: Catalog) -> str:
    """The first groups of the rollouts that were saved last in the run's `steps` steps; nothing where none were."""
    saved = {int(path.stem.removeprefix("step-")): path for path in run.rollouts.glob("step-*.parquet")}
    saved = {step: path for step, path in saved.items() if step <= steps}  # a longer one was resumed from before
    if not saved:
        return ""
    step = max(saved)
    try:
        groups = pq.read_table(saved[step]).slice(0, GROUPS_SHOWN).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{saved[step]} is damaged ({error}); delete it: the report is made without it") from error
    return f"<h2>Generated in step {step}</h2>" + "".join(_group(group, catalog) for group in groups)


def _group(group: dict[str, Any], catalog: Catalog) -> str:
    history = catalog.examples("train").history_classes(group["example_id"])[-HISTORY_SHOWN:]
    liked = " · ".join(f"<bdi>{_html(catalog.title(item_class))}</bdi>" for item_class in history)  # any script
    target_class, ranked = group["target_class"], group["candidate_class"]
    rows = [
        [str(rank), _candidate(item_class, target_class, catalog), f"{sum(logprobs):.2f}", f"{reward:+.3f}"]
        for rank, (item_class, logprobs, reward) in enumerate(
            zip(ranked, group["candidate_logprobs"], group["reward"], strict=True), 1
        )
        if rank <= CANDIDATES_SHOWN or item_class == target_class
    ]
    table = _html_table(["rank", f"best of {len(ranked)} candidates", "log\u00a0p", "reward"], rows)
    target = _html(catalog.title(target_class))
    return f'<div class="group"><p>liked last: {liked}</p><p>next: <b>{target}</b></p>{table}</div>'


def _candidate(item_class: int, target_class: int, catalog: Catalog) -> str:
    if item_class < 0:
        return "(not in the catalogue)"
    return catalog.title(item_class) + (" ✓" if item_class == target_class else "")


def running_mean(values: np.ndarray, last: int) -> np.ndarray:
    """float [n]: at each of n values the mean of the `last` up to it, or of as many as there are."""
    return np.convolve(values, np.ones(last))[: len(values)] / np.minimum(np.arange(1, len(values) + 1), last)


def _curve(steps: list[dict[str, Any]], name: str) -> str:
    """One metric over the steps, and its mean over the last tenth of all steps at each, as an inline PNG."""
    from matplotlib.figure import Figure  # takes half a second, and only the end of a run needs it
    from matplotlib.ticker import MaxNLocator

    number, value = zip(*((step["step"], step[name]) for step in steps if name in step), strict=True)
    last = 1 if name.startswith("ndcg@") else max(1, len(value) // 10)  # a validation is a mean already
    mean = running_mean(np.array(value), last)[last - 1 :]
    figure = Figure(figsize=(4.2, 2.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(number, value, lw=1, color="#9ecae1")
    axes.plot(number[last - 1 :], mean, ".-" if len(number) <= 20 else "-", lw=1.6, color="#1f77b4")
    if min(value) > 0 and max(value) > 20 * np.median(value):  # a few would flatten all others
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
