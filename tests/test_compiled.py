"""Loops are compiled wherever they come from, and whether what is compiled can be kept or not."""

import inspect
from pathlib import Path

import numpy as np

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
