"""Code that a person names in the configuration: rewards, objectives and trackers of their own."""

import ast
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any


class OwnCodeError(ValueError):
    """What is named cannot be had. The message says why, and shows the line that fails; the caller adds the name."""


def find_code(name: str, root: Path | None = None, fits: Callable[[Any], bool] = callable) -> Any:
    """What "package.module:Name" or "path/file.py:name" names.

    root: where modules and relative files are looked up first, the working directory by default; after it wherever
    Python looks for modules. fits: what to list of a module that has no such name. Raises OwnCodeError.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise OwnCodeError("write 'package.module:Name' or 'path/file.py:name'")
    root = root or Path.cwd()
    if str(root) not in sys.path:
        sys.path.append(str(root))
    module = _module_of_file(place, root) if place.endswith(".py") else _module_of_import(place, root)
    if not hasattr(module, attribute):
        fitting = {key: value for key, value in vars(module).items() if fits(value) and not key.startswith("_")}
        own = [key for key, value in fitting.items() if getattr(value, "__module__", None) == module.__name__]
        raise OwnCodeError(
            _hidden(place, root)
            or f"{place} has no {attribute!r}; it has {', '.join(own or fitting) or 'nothing of that kind'}"
        )
    return getattr(module, attribute)


def _module_of_import(place: str, root: Path) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(error.name + ".")):
            reason = _hidden(place, root) or f"there is no module {error.name!r}, neither installed nor under {root}"
            raise OwnCodeError(reason) from None
        raise OwnCodeError(
            f"{place} needs the module {error.name!r}, which is missing\n{traceback_below(error, __file__)}"
        ) from error
    except (Exception, SystemExit) as error:
        raise OwnCodeError(f"importing {place} failed: {error!r}\n{traceback_below(error, __file__)}") from error


def _hidden(place: str, root: Path) -> str | None:
    """Why a module is not that of the file under `root`, if there is one: a package of the same name comes first."""
    file, package = Path(*place.split(".")).with_suffix(".py"), place.partition(".")[0]
    found = getattr(sys.modules.get(package), "__file__", None)
    if not (root / file).is_file() or found is None or Path(found).resolve().is_relative_to(root.resolve()):
        return None
    return f"Python finds {package!r} in {Path(found).parent} before {root / file}; write '{file}:name'"


def _module_of_file(place: str, root: Path) -> ModuleType:
    """The module of a file, which finds its neighbours by import.

    It is run once per process, as an import would, since it is looked up several times before a run starts.
    """
    places = (Path(folder) / place for folder in (str(root), *sys.path))
    file = next((path.resolve() for path in places if path.is_file()), None)
    if file is None:
        raise OwnCodeError(f"there is no file {root / place}")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    loader = SourceFileLoader(str(file), str(file))  # a name that no import has, and that messages can show
    if loader.name in sys.modules:
        return sys.modules[loader.name]
    _check_neighbours(file)
    module = ModuleType(loader.name)
    module.__file__, module.__package__ = str(file), ""
    sys.modules[loader.name] = module
    try:
        loader.exec_module(module)
    except BaseException as error:
        del sys.modules[loader.name]
        if not isinstance(error, Exception | SystemExit):
            raise
        raise OwnCodeError(f"running {file} failed: {error!r}\n{traceback_below(error, __file__)}") from error
    return module


def _check_neighbours(file: Path) -> None:
    """Raise OwnCodeError where a file, or a neighbour of its, imports a neighbour and would get another module."""
    reached = [file]
    for importing in reached:
        for name in _imported(importing):
            neighbour = file.parent / f"{name}.py"
            if not neighbour.is_file():
                continue
            module = sys.modules.get(name)
            spec = None if module else find_spec(name)
            if not module and not spec:
                continue  # the import says so itself
            taken = getattr(module, "__file__", None) if module else getattr(spec, "origin", None)
            if taken is None or Path(taken).resolve() != neighbour.resolve():
                raise OwnCodeError(
                    f"{importing} imports {name!r}, for which Python takes {taken or 'a built-in module'} and not "
                    f"{neighbour}: give this one a name of its own"
                )
            if neighbour not in reached:
                reached.append(neighbour)


def _imported(file: Path) -> Iterator[str]:
    """The first part of each module that a file imports by its whole name; none of a file that is no Python."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def traceback_below(error: BaseException, file: str) -> str:
    """The traceback of an error below the frames of `file`: those that the author of called code wrote or called.

    The frames of an import by which `file` came to that code are left out as well, since a fault is never theirs.
    """
    frames = error.__traceback__
    while frames and (_imports(frames) or (frames.tb_next and frames.tb_frame.f_code.co_filename == file)):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


def _imports(frames: TracebackType) -> bool:
    file = frames.tb_frame.f_code.co_filename
    return file.startswith("<frozen importlib") or file in (importlib.__file__, __file__)
