"""Loops are compiled wherever they come from, and whether what is compiled can be kept or not."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rollout import beams
from rollout.compiled import compiled


def total(values: np.ndarray) -> float:
    found = 0.0
    for value in values:
        found += value
    return found


def test_a_loop_gives_what_python_gives() -> None:
    values = np.linspace(0, 1, 1000)
    assert compiled(total)(values) == total(values)


def test_a_function_whose_file_has_no_folder_is_compiled_anew() -> None:
    names: dict[str, object] = {}
    exec(compile(inspect.getsource(total), "<nowhere>", "exec"), {"np": np}, names)
    found = compiled(names["total"])  # type: ignore[type-var]
    assert found(np.ones(7)) == 7


def test_fields_and_the_loops_that_read_them_are_in_one_file() -> None:
    """What is compiled is kept by that file's time, and reads fields by their number."""
    read = (beams.TrieArrays, beams.Beams, beams.Pool)
    loops = [value for value in vars(beams).values() if hasattr(value, "py_func")]
    assert len(loops) > 5
    for thing in (*read, *(loop.py_func for loop in loops)):
        assert Path(inspect.getfile(thing)) == Path(beams.__file__)


def with_bounds(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with loops that look at the bounds of their arrays, compiled anew."""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(cache)}
    command, root = [sys.executable, *arguments], Path(__file__).parent.parent
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def beyond(values: np.ndarray) -> float:
    return values[len(values) + 5]


@pytest.mark.slow
def test_no_loop_reaches_beyond_its_arrays(tmp_path: Path) -> None:
    """Which nothing would notice, since compiled they look at no bounds."""
    reaching = with_bounds(
        tmp_path, "-c", "import numpy, tests.test_compiled as t; t.compiled(t.beyond)(numpy.ones(3))"
    )
    assert "IndexError" in reaching.stderr
    search = ("tests/test_search.py", "-k", "plain_one or exhaustively")
    ended = with_bounds(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", *search)
    assert ended.returncode == 0, ended.stdout
    assert "2 passed" in ended.stdout
