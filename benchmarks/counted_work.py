"""The work of one small training step, counted instead of timed: what goes through the model, ours and published.

Counts repeat exactly on any machine, however busy, so that a test can hold them.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoModelForCausalLM

from benchmarks.in_process import counted_forwards
from benchmarks.published_way import PublishedTrainer
from catalog.build import build_catalog
from catalog.config import TemplateConfig
from catalog.trie import Trie
from launch.compose import compose
from launch.model import prepare_model
from learner.policy import Policy
from rollout.config import RolloutConfig
from rollout.engines import create_engine

LEARNED = 4
"""Passes that a learned token costs: reference, policy forward, and a backward pass of twice the forward."""


def count(groups: int = 4, group_size: int = 16) -> dict[str, Any]:
    """{"ours", "theirs": {"rollout", "learn"} in tokens, {"passes"} of the rollout} on the generated catalogue."""
    with TemporaryDirectory() as folder:
        config = compose(overrides=[f"data.cache={folder}/catalog", "data.generated.users=60"])
        config.data.template = TemplateConfig()
        model_path = prepare_model(config)
        catalog = build_catalog(config.data, str(model_path))
        examples = catalog.examples("train")
        prompts = [examples.prompt_tokens(example_id).tolist() for example_id in range(groups)]
        theirs = published_work(model_path, catalog.trie, prompts, group_size)
        ours = our_work(model_path, catalog.path / "trie.arrow", prompts, group_size)
    return {"ours": ours, "theirs": theirs}


def our_work(model_path: Path, trie_path: Path, prompts: list[list[int]], group_size: int) -> dict[str, int]:
    """What the worker engine feeds to the model, and what the learner's packing does."""
    engine = create_engine(str(model_path), trie_path, RolloutConfig(group_size=group_size, kv_cache_gib=0.1))
    none = [0] * len(prompts)
    with counted_forwards() as work:
        groups = engine.generate(prompts, none, none)
    engine.shutdown()
    policy = Policy(AutoModelForCausalLM.from_pretrained(model_path))
    packed = policy.pack(prompts, [[tokens.tolist() for tokens in group.tokens] for group in groups])
    return {"rollout": work.tokens, "learn": LEARNED * packed.tokens.numel(), "passes": work.passes}


def published_work(model_path: Path, trie: Trie, prompts: list[list[int]], group_size: int) -> dict[str, int]:
    """What `generate` feeds to the model, and what one padded pass over its completions does."""
    trainer = PublishedTrainer(str(model_path), trie, group_size=group_size, device="cpu")
    fed = []
    trainer.policy.get_input_embeddings().register_forward_hook(lambda _, inputs, __: fed.append(inputs[0].numel()))
    completions = trainer.generate(prompts)
    return {"rollout": sum(fed), "learn": LEARNED * completions.ids.numel(), "passes": len(fed)}


if __name__ == "__main__":
    print(json.dumps(count(), indent=1))
