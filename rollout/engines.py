"""Chooses the rollout engine; vLLM is imported only when one is made."""

from pathlib import Path

from rollout.config import RolloutConfig
from rollout.engine import RolloutEngine


def create_engine(model_path: str | Path, trie_path: str | Path, config: RolloutConfig) -> RolloutEngine:
    """The engine that config.engine names, with the weights at model_path and the catalogue's trie."""
    if config.engine == "worker":
        from rollout.worker_engine import WorkerEngine

        return WorkerEngine(model_path, trie_path, config)
    from rollout.requests_engine import RequestsEngine

    return RequestsEngine(model_path, trie_path, config)
