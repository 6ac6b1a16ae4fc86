"""`python -m learner.parity FOLDER`: every comparison of a golden set; exit status 1 where one fails."""

import argparse
import os
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

from learner.engine import join_process_group
from learner.parity.beams import compare_beams
from learner.parity.comparison import HEADER, Comparison
from learner.parity.golden import GoldenError, GoldenSet
from learner.parity.losses import compare_losses
from learner.parity.rewards import compare_rewards
from learner.parity.trajectory import compare_trajectory
from rollout.config import RolloutConfig
from rollout.engine import RolloutEngine
from rollout.engines import create_engine


def compare_all(golden: GoldenSet) -> Iterator[Comparison | GoldenError]:
    """Everything that the set holds, with a rollout engine and a learner in this process, and what it lacks."""
    yield from or_error(compare_rewards(golden))
    yield from or_error(compare_losses(golden))
    with rollout_engine(golden) as engine:
        yield from or_error(compare_beams(golden, engine))
        for name in golden.trajectories():
            yield from or_error(compare_trajectory(golden, name, engine))


def or_error(comparisons: Iterator[Comparison]) -> Iterator[Comparison | GoldenError]:
    """The comparisons up to the first that the set does not allow, and why not."""
    try:
        yield from comparisons
    except GoldenError as error:
        yield error


def report(results: Iterable[Comparison | GoldenError]) -> int:
    """Print each result as it comes; returns how many do not hold."""
    failed = 0
    print(HEADER)
    for result in results:
        print(f"error: {result}" if isinstance(result, GoldenError) else result.line(), flush=True)
        failed += isinstance(result, GoldenError) or not result.holds
    print(f"{failed} comparisons do not hold" if failed else "every comparison holds")
    return failed


@contextmanager
def rollout_engine(golden: GoldenSet) -> Iterator[RolloutEngine]:
    """The default engine with the golden model, beside a process group of one learner."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    join_process_group(0, 1, "127.0.0.1", port, timeout_s=60)
    with tempfile.TemporaryDirectory() as folder:
        trie_path = Path(folder) / "trie.arrow"
        golden.trie.save(trie_path)
        engine = create_engine(golden.model_path, trie_path, RolloutConfig(kv_cache_gib=0.5))
        try:
            yield engine
        finally:
            engine.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="a golden set")
    folder = parser.parse_args().folder
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    transformers.utils.logging.disable_progress_bar()
    try:
        return 1 if report(compare_all(GoldenSet(folder))) else 0
    except GoldenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
