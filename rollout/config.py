"""How candidates are generated."""

from dataclasses import dataclass, field
from typing import Any, Literal

Strategy = Literal["beam", "sample", "dynamic", "stochastic_beam", "unconstrained"]
LogprobSpace = Literal["vocabulary", "trie"]
ForcedChains = Literal["at_once", "token_by_token"]


@dataclass
class RolloutConfig:
    """How groups are generated, and by how many workers."""

    engine: Literal["worker", "requests"] = "worker"
    """worker: the search runs inside the vLLM worker. requests: public vLLM API, the fallback and oracle."""
    strategy: Strategy = "beam"
    """beam: constrained beam search. sample: independent constrained samples. dynamic: oversample, then keep the
    target and the most frequent. stochastic_beam: sampling without replacement. unconstrained: no trie."""
    group_size: int = 16
    """Candidates per prompt (G)."""
    temperature: float = 1.0
    """Of the sampling strategies; beam search ignores it."""
    oversample: float = 1.5
    """dynamic: samples drawn per candidate kept."""
    logprob_space: LogprobSpace = "vocabulary"
    """vocabulary: log-softmax over all tokens, as published. trie: renormalised over the allowed tokens."""
    forced_chains: ForcedChains = "at_once"
    """Beam search in the worker engine, where the trie forces several tokens in a row; same results. at_once: one
    forward pass for as many as are needed unless a full pool ends a beam on the way. token_by_token: one for each."""
    max_completion_tokens: int = 128
    """Limit of the unconstrained strategy; constrained titles end by themselves."""
    workers: int = 1
    """Number of rollout workers (Ray actors, one vLLM engine each)."""
    tensor_parallel: int = 1
    """Devices per worker."""
    threads: int = 0
    """CPU threads per worker; 0 divides the cores by the workers."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the rollout weights and KV cache."""
    kv_cache_gib: float = 1.0
    """KV cache memory per device, in GiB."""
    max_batched_tokens: int = 4096
    """Tokens of one forward pass; longer prefills are chunked."""
    groups_per_table: int = 32
    """Groups that a worker searches together and streams as one table."""
    queue_tables: int = 2
    """Finished tables that may wait per worker before it pauses."""
    timeout_s: float = 600.0
    """Longest wait for one table, and for a worker to load weights; after a death cluster.start_timeout_s more."""
    sleep: bool = False
    """Let go of weights and KV cache while the learner works, for devices that both use; the next weights wake the
    worker. With train.staleness above 0 only during SFT, since workers then roll out meanwhile."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """More vLLM engine arguments, passed as they are; those that the project decides are refused. max_model_len: most
    tokens of a prompt with its completion; by default 2048, or the positions of the model if these are fewer."""
