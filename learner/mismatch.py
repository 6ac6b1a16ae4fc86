"""Whether rollout and learner, with the same weights, compute the same policy."""

from learner.config import LearnerConfig

LIMITS = {"float32": 0.1, "bfloat16": 5.0}
"""Far above what rounding does to the sum of a title's log-probabilities, far below what other weights do."""


class MismatchError(RuntimeError):
    """Rollouts and learner give the same candidates other log-probabilities, and not by rounding."""


def check_mismatch(mismatch: float, config: LearnerConfig) -> None:
    """Raise MismatchError for a mean difference of a candidate's log-probability beyond config.mismatch_limit."""
    limit = LIMITS[config.dtype] if config.mismatch_limit is None else config.mismatch_limit
    if not mismatch <= limit:
        raise MismatchError(
            "rollout and learner have the same weights, but the log-probabilities that they give a candidate "
            f"differ by {mismatch:.3g} on average (learner.mismatch_limit={limit:g}): vLLM and transformers compute "
            "this model differently. Try rollout.engine=requests or float32, take another model, or raise the limit "
            "where so much is known to be rounding"
        )
