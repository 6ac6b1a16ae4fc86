"""Python files that a person names by their path: rewards and objectives of their own."""

import sys
import zlib
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType


def module_of_file(file: Path) -> ModuleType:
    """The module of a file, which finds its neighbours by import. Raises what the file raises.

    It is run once per process, as an import would, since it is looked up several times before a run starts.
    """
    file = file.resolve()
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    loader = SourceFileLoader(f"file_{file.stem}_{zlib.crc32(bytes(file)):08x}", str(file))
    if loader.name in sys.modules:
        return sys.modules[loader.name]
    module = ModuleType(loader.name)
    module.__file__ = str(file)
    sys.modules[loader.name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[loader.name]
        raise
    return module
