"""What is wrong with what a person brought - data or code - in words for them."""

import importlib
import traceback
from types import TracebackType

from catalog import code_file


class CatalogError(ValueError):
    """Input that makes no catalogue. The message names the file, column, row and value, and says what to do."""


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
    return file.startswith("<frozen importlib") or file in (importlib.__file__, code_file.__file__)
