"""Everything that a run starts: Ray, rollout workers, reward actors, learner ranks; and their end."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray import ObjectRef
from ray.exceptions import AuthenticationError, LocalRayletDiedError

from catalog.atomic import atomic_file
from catalog.catalog import Catalog
from launch.config import Config, ConfigError
from launch.learner_gang import LearnerGang
from launch.nodes import check_nodes, inherited_environment
from launch.placement import Placement, actor_options, alive_nodes, check_devices, reserve
from launch.rollout_fleet import RolloutFleet
from launch.run_directory import lock_file
from launch.waiting import fetch
from rewards.pool import RewardPool
from rollout.restarts import RayLost

RAY_LATE = "timed out during startup"
"""Ray's words where its own processes are not up in the time that it gives them, which cannot be set."""


def connect(config: Config) -> Path:
    """Start a Ray of this run's own, or join the cluster at config.cluster.address; where processes write, here."""
    with _own_sigterm():
        return _connect(config) / "logs"


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and would end the driver with its stack instead of ending the run."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except BaseException:
        signal.alarm(0)  # of Ray's own answer to it, which would abort the driver 3 s later
        raise
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _connect(config: Config) -> Path:
    """Ray's folder of this session."""
    if config.cluster.address == "local":
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's actors would otherwise yield to every other program
        try:
            context = ray.init(
                address="local",  # without it Ray joins a cluster that it finds on this machine or in RAY_ADDRESS
                include_dashboard=False,
                object_store_memory=int(config.cluster.object_store_gib * 2**30),
                logging_level=logging.ERROR,
                log_to_driver=False,
                _system_config={"free_objects_period_milliseconds": 0},
            )
        except ValueError as error:  # such as a large store with the small /dev/shm of a container
            raise ConfigError(f"cluster.object_store_gib={config.cluster.object_store_gib:g}: {error}") from error
        except OSError as error:  # such as a path too long for the name of a socket
            raise ConfigError(
                f"Ray cannot start here: {error}. It writes to HOME/.ray and to RAY_TMPDIR (else TMPDIR, else /tmp), "
                "whose path may have 40 characters at most: set HOME, or set RAY_TMPDIR, to where that can be"
            ) from error
        except Exception as error:  # what Ray raises has no class of its own
            if RAY_LATE not in str(error):
                raise
            raise RayNotStarted(
                "Ray did not start within the time that it gives itself (30 s): this machine is too busy; start the "
                "run again when less else runs here"
            ) from error
    else:
        try:
            _check_somebody_listens(config.cluster.address)
            context = ray.init(
                address=config.cluster.address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                runtime_env={"env_vars": inherited_environment()},
            )
        except OSError as error:
            raise ClusterUnreachable(
                f"cluster.address={config.cluster.address}: no Ray cluster answers ({error}); start one with "
                "`ray start --head` or take a profile that starts its own, such as CLUSTER=local"
            ) from error
        except AuthenticationError as error:
            raise ClusterUnreachable(
                f"cluster.address={config.cluster.address}: the cluster and this process do not agree on Ray's token "
                "authentication; set the same RAY_AUTH_MODE for `ray start` on every node and here (Ray keeps its "
                "token in ~/.ray/auth_token)"
            ) from error
    return Path(context.address_info["session_dir"])  # type: ignore[attr-defined]


def _check_somebody_listens(address: str) -> None:
    """Raise OSError where nobody listens at host:port: Ray would try again for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


class RayNotStarted(TimeoutError):
    """Ray's own processes were not up in time."""


class ClusterUnreachable(ConnectionError):
    """No Ray cluster at the configured address."""


class Actors:
    """The actors of one run. They start at once and beside each other; leaving the context ends them all.

    >>> with Actors(config, placement, catalog, model_path, total_steps) as actors:
    ...     train(actors, ...)
    """

    def __init__(
        self, config: Config, placement: Placement, catalog: Catalog, model_path: Path, total_steps: int
    ) -> None:
        self.config, self.catalog_path = config, catalog.path.resolve()
        self.rewards = RewardPool(config.rewards, self.catalog_path)
        self.logs = connect(config)
        """What the actors of this machine print."""
        try:
            check_devices(config, placement, ray.cluster_resources())
            if config.cluster.address != "local":
                files = [self.catalog_path, model_path, lock_file(config), Path.cwd()]
                check_nodes(files, config.cluster.start_timeout_s)
            group = reserve(placement, config.cluster.start_timeout_s)
            nodes = alive_nodes()
            options = [actor_options(placement, group, index, nodes) for index in range(len(placement.actors))]
            workers = len(placement.rollout)
            self.learner = LearnerGang(config, catalog, model_path, options[workers:], total_steps)
            self.rollouts = RolloutFleet(config.rollout, catalog, model_path, options[:workers])
            self.rewards.start()
        except BaseException:
            ray.shutdown()
            raise

    def __enter__(self) -> "Actors":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        lost = isinstance(error, LocalRayletDiedError)
        try:
            if not lost:
                self.rollouts.close()
        finally:
            ray.shutdown()
        if lost:
            raise RayLost from error

    def save_rollouts(self, groups: Sequence[ObjectRef], path: Path) -> None:
        """Write groups with their titles to a Parquet file, without bringing them to the driver."""
        written = _write_parquet.remote(path.resolve(), self.catalog_path, *groups)
        fetch(written, self.config.rollout.timeout_s, f"writing {path}")


def with_titles(groups: pa.Table, catalog: Catalog) -> pa.Table:
    """`groups` with the columns target_title and candidate_titles, "" for a candidate that is no title."""
    candidates = groups["candidate_class"].combine_chunks()
    titles = [[catalog.title(c) if c >= 0 else "" for c in group] for group in candidates.to_pylist()]
    targets = [catalog.title(c) for c in groups["target_class"].to_pylist()]
    return groups.append_column("target_title", pa.array(targets, pa.string())).append_column(
        "candidate_titles", pa.array(titles, pa.list_(pa.string()))
    )


@ray.remote(num_cpus=0)
def _write_parquet(path: Path, catalog_path: Path, *groups: pa.Table) -> None:
    table = with_titles(pa.concat_tables(groups), Catalog.load(catalog_path))
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)
