"""Learners of many configurations inside the same few processes, because starting a process costs seconds."""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray import cloudpickle
from transformers import AutoModelForCausalLM

from catalog.build import build_catalog
from catalog.catalog import Catalog
from catalog.config import DataConfig, GeneratedConfig, TemplateConfig
from learner.config import LearnerConfig
from rollout.groups import Candidates, group_table

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors' processes cannot import tests
SHORT = TemplateConfig(prompt="History: {history}\nNext:\n", separator=", ")


@dataclass
class Data:
    """A model and a catalogue small enough for a step in milliseconds."""

    model_path: Path
    catalog: Catalog

    def tables(self, step: int, groups: int = 6, group_size: int = 4, hits: bool = True) -> list[pa.Table]:
        """Scored groups of one step, in two tables; every third group has equal rewards."""
        random = np.random.default_rng(step)
        examples = self.catalog.examples("train")
        ids = random.integers(0, len(examples), groups).tolist()
        found = []
        for example_id in ids:
            classes = random.choice(self.catalog.num_classes, group_size, replace=False).astype(np.int32)
            classes[0] = examples.target_class[example_id] if hits else classes[0]
            tokens = [np.asarray(self.catalog.trie.title_tokens(int(c)), np.int32) for c in classes]
            logprobs = [np.full(len(title), -1.0, np.float32) for title in tokens]
            found.append(Candidates(tokens, logprobs, classes, np.zeros(group_size, np.float32)))
        table = group_table(
            ids, step, [examples.prompt_tokens(i) for i in ids], [int(examples.target_class[i]) for i in ids], found
        )
        rewards = random.normal(size=(groups, group_size)).astype(np.float32)
        rewards[::3] = 0.0
        table = table.append_column("reward", pa.array(list(rewards), pa.list_(pa.float32())))
        return [table.slice(0, groups // 2), table.slice(groups // 2)]


def with_settings(model_path: Path, to: Path, file: str, settings: dict[str, Any]) -> Path:
    """A copy of a model, with more settings in one of its JSON files."""
    shutil.copytree(model_path, to)
    (to / file).write_text(json.dumps(json.loads((to / file).read_text()) | settings))
    return to


@pytest.fixture(scope="session")
def learner_data(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    config = DataConfig(
        cache=str(tmp_path_factory.mktemp("catalog")), generated=GeneratedConfig(items=40, users=20), template=SHORT
    )
    return Data(tiny_model_dir, build_catalog(config, str(tiny_model_dir)))


@ray.remote(num_cpus=0, runtime_env={"env_vars": {"OMP_WAIT_POLICY": "passive"}})
class Process:
    """One rank that makes and drops learners."""

    def address(self) -> int:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    def join(self, rank: int, world_size: int, port: int, data: Data) -> None:
        import os

        import torch

        from learner.engine import join_process_group

        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        self.device = join_process_group(rank, world_size, "127.0.0.1", port, 120.0)
        self.data = data

    def train(
        self,
        config: LearnerConfig,
        steps: Sequence[Sequence[pa.Table]],
        save_at: tuple[int, str] | None = None,
        load_at: tuple[int, str] | None = None,
        model_path: str | None = None,
    ) -> dict[str, Any]:
        """The metrics of every step and the weights after the last, under Hugging Face names.

        save_at: (steps done, path) of a checkpoint on the way. load_at: where to begin instead of at the first step.
        model_path: of another policy than the data's.
        """
        learner = self._learner(config, len(steps), model_path)
        if load_at is not None:
            learner.load_checkpoint(Path(load_at[1]))
        metrics = []
        for step in range(load_at[0] if load_at else 0, len(steps)):
            metrics.append(learner.step(steps[step]))
            if save_at is not None and save_at[0] == step + 1:
                learner.save_checkpoint(Path(save_at[1]), {}, None)
        buckets = list(learner.export_weights())
        result = {
            "metrics": metrics,
            "weights": {name: t.float().numpy().copy() for b in buckets for name, t in b.tensors()},
            "sent": _checksum(buckets),
            "checksum": learner.weights_checksum(),
            "reference": self._reference(learner),
        }
        learner.engine.destroy()
        return result

    def sft(
        self,
        config: LearnerConfig,
        folder: str,
        save_to: str | None = None,
        killed_in: int | None = None,
        model_path: str | None = None,
    ) -> dict[str, Any]:
        """All reports of SFT, and the validation loss of the weights that it leaves.

        killed_in: break it off in this epoch. model_path: of another policy than the data's.
        """
        from learner.sft import SupervisedFineTuning

        learner = self._learner(config, model_path=model_path)
        reports = list(takewhile(lambda report: report["epoch"] != killed_in, learner.sft(Path(folder))))
        after = SupervisedFineTuning(learner.engine, learner.policy, self.data.catalog, config).valid_loss()
        if save_to is not None:
            learner.save_huggingface(Path(save_to))
        result = {"reports": reports, "loss_after": after, "checksum": learner.weights_checksum()}
        learner.engine.destroy()
        return result

    def export_to(self, config: LearnerConfig, steps: Sequence[Sequence[pa.Table]], path: str) -> list[float]:
        """Train, write a Hugging Face directory, and return the policy's own log-probabilities of one group."""
        import torch

        learner = self._learner(config, total_steps=len(steps))
        for tables in steps:
            learner.step(tables)
        learner.save_huggingface(Path(path))
        prompt, title = self.data.catalog.examples("train").prompt_tokens(0), self.data.catalog.trie.title_tokens(0)
        with torch.no_grad():
            logprobs = learner.policy(learner.policy.pack([prompt], [[title]]))[0].tolist()
        learner.engine.destroy()
        return logprobs

    def _learner(self, config: LearnerConfig, total_steps: int = 1, model_path: str | None = None) -> Any:
        from learner.learner import Learner

        path = model_path or str(self.data.model_path)
        return Learner(path, self.data.catalog, config, "vocabulary", total_steps, 0, self.device)

    def _reference(self, learner: Any) -> dict[str, np.ndarray] | None:
        if learner._reference is None:
            return None
        return {name: weight.float().cpu().numpy().copy() for name, weight in learner._reference._weights.items()}


def _checksum(buckets: Sequence[Any]) -> int | None:
    from rollout.weights import checksum

    return checksum(entry for bucket in buckets for entry in bucket.tensors()) if buckets else None


class Gang:
    """Ranks of one process group; every call is made on all of them and returns rank 0's result."""

    def __init__(self, world_size: int, data: Data) -> None:
        self.data = data
        self.processes = [Process.remote() for _ in range(world_size)]  # type: ignore[attr-defined]
        port = ray.get(self.processes[0].address.remote())
        ray.get([process.join.remote(r, world_size, port, data) for r, process in enumerate(self.processes)])

    def __call__(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        return ray.get([getattr(process, method).remote(*arguments, **keywords) for process in self.processes])[0]

    def close(self) -> None:
        for process in self.processes:
            ray.kill(process)


@pytest.fixture(scope="session")
def gangs(ray_session: None, learner_data: Data) -> Iterator[dict[int, Gang]]:
    """A gang of one rank and a gang of two."""
    made = {size: Gang(size, learner_data) for size in (1, 2)}
    yield made
    for gang in made.values():
        gang.close()


def assert_same_training(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], data: Data) -> None:
    """Weights within 1e-5 of their norm, and their error within 1e-3 of the norm of what training changed.

    Over all weights at once: single ones whose gradient is zero but for rounding get a unit step from Adam.
    """
    initial = AutoModelForCausalLM.from_pretrained(data.model_path)
    assert found.keys() == expected.keys() == {name for name, _ in initial.named_parameters()}
    vectors = (_flat(found), _flat(expected), _flat({n: p.detach().numpy() for n, p in initial.named_parameters()}))
    error = np.linalg.norm(vectors[0] - vectors[1])
    assert error <= 1e-5 * np.linalg.norm(vectors[1])
    assert error <= 1e-3 * np.linalg.norm(vectors[1] - vectors[2])


def _flat(weights: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([weights[name].astype(np.float64).ravel() for name in sorted(weights)])
