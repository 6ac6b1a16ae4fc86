"""The workloads that are measured: a model, a catalogue and a number of groups each."""

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import REPOSITORY
from catalog.build import build_catalog
from catalog.catalog import Catalog
from launch.config import Config, compose
from launch.model import prepare_model


class ShapeAbsentError(Exception):
    """The model or the data of a shape is not on this machine; the message says how to provide it."""


@dataclass(frozen=True)
class Shape:
    """One workload, identical for both sides."""

    name: str
    groups: int
    real: bool
    """SmolLM2-135M on the real Industrial catalogue (MODEL=, DATA=); else the embedded catalogue and its model."""
    dtype: str = "float32"
    overrides: tuple[str, ...] = ()


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny-64", groups=64, real=False),
        Shape("industrial-135m-fp32", groups=4, real=True),
        Shape("industrial-135m-bf16", groups=4, real=True, dtype="bfloat16"),
    )
}


@dataclass(frozen=True)
class Workload:
    """A shape with everything built."""

    shape: Shape
    config: Config
    model_path: Path
    catalog: Catalog

    @property
    def example_ids(self) -> list[int]:
        """Groups of the step, evenly spaced over the training split."""
        return self.step_examples(self.shape.groups)

    def step_examples(self, groups: int) -> list[int]:
        total = len(self.catalog.examples("train"))
        return [int((index + 0.5) * total / groups) for index in range(groups)]

    def prompts(self, example_ids: list[int]) -> list[list[int]]:
        examples = self.catalog.examples("train")
        return [examples.prompt_tokens(example_id).tolist() for example_id in example_ids]

    def target_classes(self, example_ids: list[int]) -> list[int]:
        examples = self.catalog.examples("train")
        return [int(examples.target_class[example_id]) for example_id in example_ids]


def build(shape: Shape, *overrides: str) -> Workload:
    """Build or reuse the catalogue and the model. Raises ShapeAbsentError where they cannot be had."""
    config = compose(
        cluster="local",
        data=_folder("DATA", REPOSITORY.parent / "shared/data/industrial") if shape.real else "embedded",
        model=_folder("MODEL", REPOSITORY / "models/smollm2-135m") if shape.real else "small",
        overrides=[
            f"rollout.dtype={shape.dtype}",
            f"learner.dtype={shape.dtype}",
            f"rollout.groups_per_table={shape.groups}",
            f"train.prompts_per_step={shape.groups}",
            "learner.optimizer.schedule=constant",
            "learner.optimizer.warmup_ratio=0",
            *shape.overrides,
            *overrides,
        ],
    )
    model_path = prepare_model(config)
    return Workload(shape, config, model_path, build_catalog(config.data, str(model_path)))


def _folder(variable: str, default: Path) -> str:
    """The folder that an environment variable names, or the default if it exists."""
    path = Path(os.environ.get(variable) or default)
    if not path.is_dir():
        raise ShapeAbsentError(f"{path} does not exist; give a folder with {variable}=")
    return str(path)
