"""Imports of libraries that take seconds."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """For imports alone: Python's cycle collector rests meanwhile, and never looks at what has come by then.

    vLLM brings 6,000 modules of a million objects. The collector would go through them again and again while they
    come, and whole once more each time that an engine asks for a collection as it starts.
    """
    rested = not gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries that count what they leak would count all of it
        if not rested:
            gc.enable()
