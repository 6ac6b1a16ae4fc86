"""What imports large libraries, and how."""

import gc
import os
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

from rollout.imports import collector_at_rest


def test_the_driver_of_a_run_leaves_large_libraries_to_its_actors(tiny_model_dir: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import launch.run; from launch.compose import compose; "
        "from launch.model_folder import parameters; from launch.placement import check_this_machine, plan; "
        "from launch.run_directory import RunDirectory; "
        "config = compose(); check_this_machine(config, plan(config)); RunDirectory(config, '0').close(); "
        f"assert parameters(Path({str(tiny_model_dir)!r})) > 0; "
        "print(sorted({'torch', 'transformers', 'vllm', 'deepspeed', 'matplotlib', 'scipy'} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert printed.stdout.splitlines() == ["[]"], printed.stderr


def test_the_collector_rests_during_imports_and_leaves_what_they_brought_alone() -> None:
    frozen = gc.get_freeze_count()
    with collector_at_rest():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_at_rest():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
