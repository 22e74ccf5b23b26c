"""The progress of a long run: a bar on a terminal; elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

EVERY_S = 30.0  # between two lines
PLAIN_WIDTH = 160  # of tables where no terminal says how wide it is


def console_for(stream: TextIO) -> Console:
    """Return Rich's console; wide enough for whole rows where the stream is no terminal."""
    console = Console(file=stream)
    return console if console.is_terminal else Console(file=stream, width=PLAIN_WIDTH)


class Progress:
    """Steps done of all, what is being done, and the time left; on standard error, inside a ``with`` block.

    Args:
        total: steps.
        every_s: seconds between lines where there is no terminal; the first comes after as many.
        left: seconds until a deadline, called anew each time; None estimates them by the steps.
        now: seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        every_s: float = EVERY_S,
        left: Callable[[], float | None] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.finished = total, 0
        self._every_s, self._left, self._now = every_s, left, now
        self._started = self._said = now()
        self._step = ""
        console = console_for(sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self._is_bar = console.is_terminal
        self._bar = Bar(*columns, *times, console=console, transient=True, disable=not self._is_bar)
        self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> Progress:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._bar.stop()

    def step(self, what: str) -> None:
        """Say what the next step is."""
        self._step = what
        self._show(what)

    def detail(self, what: str) -> None:
        """Say what within the step is being done."""
        self._show(f"{self._step}: {what}" if self._step else what)

    def done(self, steps: int = 1) -> None:
        """Count finished steps."""
        self.finished += steps
        self._bar.advance(self._task, steps)

    def _show(self, what: str) -> None:
        self._bar.update(self._task, description=what)
        if self._is_bar or self._now() - self._said < self._every_s:
            return
        self._said = self._now()
        elapsed = self._said - self._started
        left = self._left() if self._left is not None else None
        if left is None and self.finished:
            left = elapsed / self.finished * (self.total - self.finished)
        rest = "" if left is None else f", about {max(0.0, left):.0f} s left"
        line = f"[{self.finished}/{self.total}] {elapsed:.0f} s{rest}: {what}"
        print(line, file=sys.stderr, flush=True)
