"""The allocator of the processes that compute on a CPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rollout.host_memory import host_environment

_STEPS = """
import random, resource, threading, time
import psutil, torch
from rollout.host_memory import return_freed_memory

def step(seed):
    shapes = random.Random(seed)
    rows = [shapes.randrange(500, 900) for _ in range(3)]
    for count in rows:
        kept = [torch.ones(count, width) for width in (576, 576, 1536, 1536, 1536) for _ in range(8)]

def faults(run):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

held, process = [], psutil.Process()
def work():
    for seed in range(60):
        step(seed)
        held.append(process.memory_info().rss)
    print(held[-1] / held[19], faults(lambda: [step(seed) for seed in range(20)]))

thread = threading.Thread(target=work)
thread.start()
thread.join()
time.sleep(0.5)  # a thread that Python has joined may still be leaving
return_freed_memory()
print(process.memory_info().rss / held[-1])
"""


def test_the_users_own_allocator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
    assert host_environment() == {}


@pytest.mark.skipif(
    not Path(find_spec("ray").origin or "").parent.joinpath("core/libjemalloc.so").is_file(),  # type: ignore[union-attr]
    reason="this build of Ray brings no jemalloc",
)
def test_memory_of_ever_new_shapes_is_kept_bounded_and_returned_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_PRELOAD", "MALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    environment = {**os.environ, **host_environment()}
    run = subprocess.run([sys.executable, "-c", _STEPS], capture_output=True, text=True, check=True, env=environment)
    assert "cannot be preloaded" not in run.stderr
    (grown, faults), (left,) = ([float(word) for word in line.split()] for line in run.stdout.splitlines())
    assert grown < 1.1, "memory grows with every step of new shapes"
    assert faults < 20_000, "freed memory was given back and faulted in anew"  # each step uses 60,000 pages
    assert left < 0.8, "what is freed was not returned"
