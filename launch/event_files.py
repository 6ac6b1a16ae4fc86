"""TensorBoard's event files, written with TensorBoard's own writer: torch's would cost the driver all of torch."""

import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class EventFile:
    """A new event file in a folder; what it cannot write it raises as OSError, in that call or in a later one."""

    def __init__(self, folder: Path, forget_from: int | None = None) -> None:
        """forget_from: the step from which on TensorBoard is to hide what older files of the folder show."""
        self._writer = EventFileWriter(str(folder))
        if forget_from is not None:
            self._add(forget_from, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """The values of a step."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._add(step, summary=Summary(value=values))

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))
