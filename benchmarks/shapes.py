"""The workloads that are measured: a model, a catalogue and a number of groups each."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import REPOSITORY
from catalog.atomic import atomic_folder
from catalog.build import build_catalog
from catalog.catalog import Catalog
from catalog.config import TemplateConfig
from launch.actors import Actors
from launch.compose import compose
from launch.config import Config
from launch.model import prepare_model
from launch.placement import plan
from learner.config import SftConfig


class ShapeAbsentError(Exception):
    """The model or the data of a shape is not on this machine; the message says how to provide it."""


SMOLLM2 = "smollm2-135m"


@dataclass(frozen=True)
class Shape:
    """One workload, identical for both sides."""

    name: str
    groups: int
    real: bool
    """SmolLM2-135M on the real Industrial catalogue (MODEL=, DATA=); else the embedded catalogue, with the published
    prompt as the real one has, and its small model after an epoch of SFT."""
    dtype: str = "float32"
    overrides: tuple[str, ...] = ()
    model: str = SMOLLM2
    """Of a real one: the folder of models/; MODEL= names another for SmolLM2."""


ON_GPU = os.environ.get("SCALE") == "gpu"
GROUPS = 64 if ON_GPU else 4


def _on_gpus() -> tuple[str, ...]:
    """SCALE=gpu: one GPU rolls out and another learns, or the only one does both in turn; batches fill them."""
    if not ON_GPU:
        return ()
    import torch

    alone = torch.cuda.device_count() < 2
    in_turn = ("cluster.colocate=true", "rollout.sleep=true", "learner.sleep=true")
    sizes = ("rollout.kv_cache_gib=16", "rollout.max_batched_tokens=16384")
    batches = ("learner.micro_batch_tokens=65536", "learner.logit_mib=2048", "cluster.object_store_gib=8")
    return (f"cluster.gpus={1 if alone else 2}", "cluster.device=gpu", *(in_turn if alone else ()), *sizes, *batches)


def measurable(shapes: Iterable[str]) -> tuple[tuple[str, ...], str]:
    """Those of some shapes that this machine can measure in reasonable time, and a remark on the others."""
    from learner.products import has_bfloat16  # imports torch, which the driver of a run does not hold

    here = ON_GPU or has_bfloat16()
    kept = tuple(shape for shape in shapes if here or not shape.endswith("bf16"))
    left_out = [shape for shape in shapes if shape not in kept]
    remark = (
        f"Left out: {', '.join(left_out)}. This CPU has no bfloat16 instructions, torch emulates them, and the "
        "published way would take up to an hour."
    )
    return kept, remark if left_out else ""


SMALL = () if ON_GPU else ("rollout.kv_cache_gib=0.4", "learner.micro_batch_tokens=1024")
"""The KV cache that 4 groups need; in the learner a group at a time, as in the published way's forward pass."""

LEAN = (
    ()
    if ON_GPU
    else ("rollout.kv_cache_gib=0.2", "learner.micro_batch_tokens=4096", "learner.gradient_checkpointing=true")
)
"""The same in bfloat16, where the published way takes so much less that our weights and processes are felt: all groups
in one pass, so that gradients need no float32 sum, and their activations computed anew, for a twentieth of a step."""

LARGE = () if ON_GPU else ("rollout.max_batched_tokens=16384", "learner.micro_batch_tokens=8192")
"""What is fastest for a tiny model."""

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny-64", groups=64, real=False, overrides=("data.generated.users=400", *LARGE)),
        Shape("industrial-135m-fp32", groups=GROUPS, real=True, overrides=SMALL),
        Shape("industrial-135m-bf16", groups=GROUPS, real=True, dtype="bfloat16", overrides=LEAN),
        Shape("industrial-0.5b-bf16", groups=GROUPS, real=True, dtype="bfloat16", model="qwen2-0.5b"),
    )
    if ON_GPU or shape.model == SMOLLM2
}


@dataclass(frozen=True)
class Workload:
    """A shape with everything built."""

    shape: Shape
    config: Config
    model_path: Path
    catalog: Catalog

    def step_examples(self, step: int) -> list[int]:
        """Examples of one step, evenly spaced over the training split and others at every step."""
        total = len(self.catalog.examples("train"))
        spacing = total / self.shape.groups
        return [int((index + 0.5) * spacing + step) % total for index in range(self.shape.groups)]

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
        model=_folder("MODEL" if shape.model == SMOLLM2 else "", REPOSITORY / "models" / shape.model)
        if shape.real
        else "small",
        overrides=[
            f"rollout.dtype={shape.dtype}",
            f"learner.dtype={shape.dtype}",
            f"rollout.groups_per_table={shape.groups}",
            f"train.prompts_per_step={shape.groups}",
            "learner.optimizer.schedule=constant",
            "learner.optimizer.warmup_ratio=0",
            *_on_gpus(),
            *shape.overrides,
            *overrides,
        ],
    )
    config.data.template = TemplateConfig()
    model_path = prepare_model(config)
    catalog = build_catalog(config.data, str(model_path))
    return Workload(shape, config, model_path if shape.real else _warmed_up(config, model_path, catalog), catalog)


def _warmed_up(config: Config, model_path: Path, catalog: Catalog) -> Path:
    """The model after one epoch of SFT, made once: with random weights every title would be about as likely."""
    path = model_path.with_name(f"{model_path.name}-warm-{catalog.fingerprint}")
    if not path.is_dir():
        config = replace(config, learner=replace(config.learner, dtype="float32", sft=SftConfig(epochs=1)))
        with TemporaryDirectory() as folder, Actors(config, plan(config), catalog, model_path, 1) as actors:
            actors.learner.join()
            for _ in actors.learner.sft(Path(folder)):
                pass
            with atomic_folder(path) as temporary:  # a folder that is there is taken for whole
                actors.learner.save_huggingface(temporary)
    return path


def _folder(variable: str, default: Path) -> str:
    """The folder that an environment variable names, or the default if it exists."""
    path = Path(os.environ.get(variable) or default)
    if not path.is_dir():
        raise ShapeAbsentError(f"{path} does not exist" + (f"; give a folder with {variable}=" if variable else ""))
    return str(path)
