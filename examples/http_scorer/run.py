"""Start the scorer, have the `http` reward ask it about sample groups, stop it.

python examples/http_scorer/run.py
"""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from rewards.check import main as check

HERE = Path(__file__).resolve().parent
START_S = 60.0


@contextmanager
def scorer(token: str) -> Iterator[str]:
    """The address of a scorer that runs as long as the context does. Raises RuntimeError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "scorer:app", "--port", str(port), "--log-level", "warning"]
    process = subprocess.Popen(command, cwd=HERE, env=os.environ | {"SCORER_TOKEN": token})
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, address)
        yield address
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen, address: str) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            httpx.get(f"{address}/health").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise RuntimeError(f"the scorer at {address} did not start within {START_S:g} s; is uvicorn installed?")


if __name__ == "__main__":
    os.environ["SCORER_TOKEN"] = secrets.token_hex(8)
    with scorer(os.environ["SCORER_TOKEN"]) as address:
        sys.exit(check(["http", "--args", f"url={address}/score", "token_env=SCORER_TOKEN", "retries=2"]))
