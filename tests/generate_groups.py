"""Generates groups in a process of its own: python generate_groups.py MODEL TRIE TENSOR_PARALLEL PROMPTS OUT.

Then a rank of the engine is killed.
"""

import json
import os
import signal
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from rollout.config import RolloutConfig
from rollout.engine import EngineDied
from rollout.vllm_arguments import EngineError
from rollout.weights import WeightBucket, checksum
from rollout.worker_engine import WorkerEngine


def main(model: str, trie: str, tensor_parallel: str, prompts_file: str, out: str) -> None:
    prompts = json.loads(Path(prompts_file).read_text())
    config = RolloutConfig(kv_cache_gib=0.05, max_batched_tokens=1024, tensor_parallel=int(tensor_parallel))
    engine = WorkerEngine(model, trie, config)
    named = [
        (name, weight.detach()) for name, weight in AutoModelForCausalLM.from_pretrained(model).named_parameters()
    ]
    loaded = engine.load_weights([WeightBucket.pack(named)])
    groups = engine.generate(prompts, range(len(prompts)), [0] * len(prompts), group_size=8)
    try:
        engine.load_weights([WeightBucket.pack(named[:-1])])
    except EngineError as error:
        refused = str(error)
    os.kill(engine._llm.llm_engine.model_executor.workers[-1].proc.pid, signal.SIGKILL)
    deaths = []
    for _ in range(2):
        try:
            engine.generate(prompts, range(len(prompts)), [0] * len(prompts), group_size=8)
        except EngineDied as death:
            deaths.append(str(death))
    engine.shutdown()
    found = [{"item_class": group.item_class.tolist(), "score": group.score.tolist()} for group in groups]
    answer = {"loaded": loaded, "sent": checksum(named), "groups": found, "refused": refused, "deaths": deaths}
    Path(out).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
