"""What is wrong with what a person brought - data or code - in words for them."""

import traceback


class CatalogError(ValueError):
    """Input that makes no catalogue. The message names the file, column, row and value, and says what to do."""


def traceback_below(error: BaseException, file: str) -> str:
    """The traceback of an error below the frames of `file`: those that the author of called code wrote or called."""
    frames = error.__traceback__
    while frames and frames.tb_next and frames.tb_frame.f_code.co_filename == file:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()
