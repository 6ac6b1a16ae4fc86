"""What a person sees while a run works: one live line per stage on a terminal, plain lines elsewhere."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from catalog.visible import visible

PLAIN_INTERVAL_S = 10.0
PLAIN_WIDTH = 1000
"""Of tables in files and pipes, which have no width; rich would take 80 and cut off the columns beyond."""
NOTHING = (0, "")
"""What a stage has said before its first word."""
NAME_WIDTH = 40
"""Names of a table's rows are not cut up to here, however narrow the terminal."""


class Stage:
    """One stage: how far it is, what it last said, how long it has taken. Rich redraws it, so its clock goes on."""

    def __init__(self, name: str, total: int | None) -> None:
        self.name, self.total = name, total
        self.done, self.detail, self.started = 0, "", time.monotonic()
        self.plain = False
        self._printed_at = self.started
        self._printed: tuple[int, str] | None = None
        self._printing = threading.Lock()

    def update(self, done: int | None = None, detail: str | None = None) -> None:
        """`done` of the total units, and a few words on the latest one."""
        with self._printing:
            self.done = self.done if done is None else done
            self.detail = self.detail if detail is None else detail
            if self.plain and time.monotonic() - self._printed_at >= PLAIN_INTERVAL_S:
                self._print()

    def say_if_silent(self) -> None:
        """Print what it is at, once, after PLAIN_INTERVAL_S without a line."""
        with self._printing:
            silent = time.monotonic() - self._printed_at >= PLAIN_INTERVAL_S
            if silent and (self.done, self.detail) not in (self._printed, NOTHING):
                self._print()

    def end(self) -> None:
        """Print where it stands, unless that has just been printed."""
        just_now = time.monotonic() - self._printed_at < PLAIN_INTERVAL_S
        if not (just_now and self._printed == (self.done, self.detail)):
            self._print()

    def _print(self) -> None:
        self._printed_at, self._printed = time.monotonic(), (self.done, self.detail)
        print(self, flush=True)

    def __str__(self) -> str:
        count = f"{self.done}/{self.total}" if self.total else ""
        return f"{self.name:<14}{count:>9}  {self.detail}  [{time.monotonic() - self.started:.1f} s]"

    def __rich__(self) -> Text:
        return Text(str(self))


@contextmanager
def _said_in_time(stage: Stage) -> Iterator[None]:
    """What a stage is at is printed where nothing new comes for PLAIN_INTERVAL_S, and at its end, whatever ends it."""
    ended = threading.Event()

    def watch() -> None:
        with suppress(BrokenPipeError):  # which the stage's own next line raises where it is heard
            while not ended.wait(PLAIN_INTERVAL_S / 10):
                stage.say_if_silent()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
        stage.end()


class _Output(Console):
    """Of a command. That nobody reads it any more is an error like others; rich would end the process at once."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Progress:
    """Stages with a line each.

    >>> with progress.stage("train", total=60) as stage:
    ...     stage.update(1, "reward 0.21")
    train         1/60  reward 0.21  [0.4 s]
    """

    def __init__(self) -> None:
        self.console = _Output(highlight=False)
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = PLAIN_WIDTH

    def line(self, text: str) -> None:
        """One plain line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table between its title and a blank line; the first column is text, the others are figures.

        Brackets and backslashes in it are shown as they are, and control characters spelled out: titles have them.
        """
        title, columns, rows = visible(title), list(map(visible, columns)), [list(map(visible, row)) for row in rows]
        self.line(title)
        table = Table(show_edge=False, pad_edge=False)
        widest = max((len(row[0]) for row in rows), default=0)
        whole = widest <= NAME_WIDTH  # rich would narrow it, then widen it again and cut off the last column instead
        table.add_column(Text(columns[0]), no_wrap=whole, min_width=min(widest, NAME_WIDTH), overflow="fold")
        for column in columns[1:]:
            table.add_column(Text(column), justify="right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self.console.print(table, "")

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """A stage of the run; its last line stays when it ends."""
        stage = Stage(name, total)
        if self.console.is_interactive:
            with Live(stage, console=self.console, refresh_per_second=8):
                yield stage
        else:
            stage.plain = True
            with _said_in_time(stage):
                yield stage
