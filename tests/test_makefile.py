"""What `make` takes and passes on."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("words", [["DRYRUN=1"], ["STEP=3", "DRY_RUN=1"], ["Data=folder"]])
def test_a_mistyped_make_variable_is_refused(words: list[str]) -> None:
    made = subprocess.run(["make", "-n", "launch", *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert made.returncode == 2
    assert f"unknown: {words[0].partition('=')[0]}. Variables are CLUSTER DATA MODEL" in made.stderr


@pytest.mark.parametrize(
    ("says", "environment"),
    [("GPU 0: NVIDIA H200 (UUID: GPU-1)", ".venv-gpu/"), ("NVIDIA-SMI has failed because it could not", ".venv/")],
)
def test_a_gpu_is_one_that_the_driver_lists(says: str, environment: str, tmp_path: Path) -> None:
    driver, calls = tmp_path / "nvidia-smi", tmp_path / "calls"
    driver.write_text(f"#!/bin/sh\necho call >> {calls}\necho '{says}'\n")
    driver.chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for words, known in (
        (["CLUSTER=8xA100"], environment),
        (["CLUSTER=8xA100", "DEVICE=cpu"], ".venv/"),
        (["DEVICE="], ".venv/"),
        ([], ".venv/"),
    ):
        command = ["make", "-n", "launch", *words]
        made = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=True)
        assert f" {known}bin/python -m launch.cli train" in made.stdout
    assert calls.read_text() == "call\n"


@pytest.mark.parametrize("flag", ["DRY_RUN", "RESUME", "OVERWRITE"])
def test_what_is_neither_yes_nor_no_is_refused(flag: str) -> None:
    command = ["make", "-n", "launch", f"{flag}=perhaps"]
    made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert made.returncode == 2
    assert f"{flag}=perhaps: write 1 for yes, 0 for no" in made.stderr


@pytest.mark.parametrize(
    ("value", "flags"),
    [("1", ["--resume"]), ("yes", ["--resume"]), ("auto", ["--auto-resume"]), ("0", []), ("False", [])],
)
def test_make_passes_what_it_is_given(value: str, flags: list[str]) -> None:
    command = ["make", "-n", "launch", "NAME=mine", f"RESUME={value}", "ARGS=a.b=c"]
    made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    (line,) = [line for line in made.stdout.replace("\\\n", " ").splitlines() if "launch.cli train" in line]
    assert [word for word in line.split() if "resume" in word] == flags
    assert '--name "mine"' in line
    assert line.rstrip().endswith("-- a.b=c")


def test_the_name_of_the_machine_is_no_name_of_a_run() -> None:
    """WSL puts it into the environment as NAME."""
    for name, passed in ((socket.gethostname(), False), ("mine", True)):
        variables = {**os.environ, "NAME": name}
        made = subprocess.run(
            ["make", "-n", "launch"], cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=True
        )
        assert (f'--name "{name}"' in made.stdout) == passed


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_device_is_cpu_or_gpu(device: str) -> None:
    command = ["make", "-n", "launch", f"DEVICE={device}"]
    made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert made.returncode == 2
    assert f"DEVICE={device}: write cpu or gpu" in made.stderr


def test_an_environment_that_could_not_be_made_is_made_the_next_time(tmp_path: Path) -> None:
    """Debian's Python without python3-venv leaves an interpreter behind."""
    python, venv = tmp_path / "python", tmp_path / "venv"
    python.write_text(f'#!/bin/sh\n[ "$2" = venv ] || exit 0\nmkdir -p {venv}/bin\ntouch {venv}/bin/python\nexit 1\n')
    python.chmod(0o755)
    command = ["make", f"{venv}/bin/python", f"VENV={venv}", f"PYTHON={python}"]
    for _ in range(2):
        made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert made.returncode == 2
        assert f"there is no environment in {venv}" in made.stdout


def test_what_is_imported_is_compiled_once(tmp_path: Path) -> None:
    """pip has compiled nothing, so an environment that forbids bytecode would have each process compile everything."""
    python, ready = tmp_path / "bin" / "python", tmp_path / ".ready-cpu"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "forbidden: ${PYTHONDONTWRITEBYTECODE:-no}"\n')
    python.chmod(0o755)
    ready.touch()
    command = ["make", "--no-print-directory", "launch", f"VENV={tmp_path}"]
    variables = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    made = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=True)
    assert made.stdout == "forbidden: no\n"
