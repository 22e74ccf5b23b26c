"""Tasks that run one after the other, on GPUs in a process of their own.

An illegal access poisons a process for all that follows, a kernel may never return, and a library may crash: none of
it is the next task's fault. :class:`Isolated` then marks what was being done as failed and goes on in a fresh process;
what a task had found before stands. :class:`Inline` is the same without another process, for CPUs and for tests.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

SILENCE_S = 900.0  # a step that says nothing of its time may take that long
MARGIN_S = 60.0  # beyond the time that it says it may take
END_S = 5.0  # for a process to end


class DeviceFailed(Exception):
    """The device failed in a task, and nothing more can run on it in this process."""


class Channel(Protocol):
    """The end of a task's that says what it does and hands over what it finds."""

    def say(self, text: str, who: str = "", seconds: float | None = None) -> None:
        """Begin a step.

        Args:
            text: what it is.
            who: whose failure it is if the step fails.
            seconds: it may take at most; None says nothing of it.
        """

    def found(self, item: Any) -> None:
        """Hand over a result, which stands whatever comes next."""


class Session(Protocol):
    """A runner of tasks with all that they share; made in the process that runs them."""

    def run(self, task: Any, channel: Channel) -> None:
        """Run a task.

        Raises:
            DeviceFailed: no other task can run in this process.
        """


@dataclass(frozen=True)
class Failure:
    """The reason why a task did not come to its end.

    Attributes:
        reason: in words.
        who: of the step that it was at; "" where that was nobody's.
    """

    reason: str
    who: str = ""


class Worker(Protocol):
    """A process that runs the tasks, this one or another.

    Attributes:
        make: makes the session.
    """

    make: Callable[[], Session]

    def run(self, task: Any, channel: Channel) -> Failure | None:
        """Run a task; None if it came to its end."""

    def close(self) -> None:
        """End what is left of it."""


class _Noted:
    """A channel that remembers whose step it is."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self.who = channel, ""

    def say(self, text: str, who: str = "", seconds: float | None = None) -> None:
        self.who = who
        self._channel.say(text, who, seconds)

    def found(self, item: Any) -> None:
        self._channel.found(item)


class Inline:
    """Runs tasks in this process; after a failure of the device in a new session, but in the same process.

    Args:
        make: makes the session.
    """

    def __init__(self, make: Callable[[], Session]) -> None:
        self.make = make
        self._session: Session | None = None

    def run(self, task: Any, channel: Channel) -> Failure | None:
        """Run a task."""
        noted = _Noted(channel)
        try:
            if self._session is None:
                self._session = self.make()
            self._session.run(task, noted)
        except DeviceFailed as failed:
            self.close()
            return Failure(str(failed), noted.who)
        return None

    def close(self) -> None:
        """Forget the session; the next task gets a new one."""
        self._session = None


class Isolated:
    """Runs tasks in another process, and in a fresh one after a failure.

    Args:
        make: makes the session in that process; it can be pickled. May be replaced between tasks: the next process
            takes the new one.
        silence_s: seconds that a step may take which says nothing of its time.
        margin_s: seconds beyond the time that a step says it may take.
    """

    def __init__(
        self, make: Callable[[], Session], *, silence_s: float = SILENCE_S, margin_s: float = MARGIN_S
    ) -> None:
        self.make, self._silence_s, self._margin_s = make, silence_s, margin_s
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Connection | None = None

    def start(self) -> Connection:
        """Start the process, if there is none, so that it gets ready while this one does something else.

        Returns:
            The pipe to it.
        """
        if self._pipe is None:
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(self.make, theirs), name="bench-worker")
            self._process.start()
            theirs.close()
        return self._pipe

    def run(self, task: Any, channel: Channel) -> Failure | None:
        """Run a task.

        Raises:
            RuntimeError: the session can't be made, or raised what is no failure of the device: with its traceback.
        """
        pipe, who, limit = self.start(), "", self._silence_s
        try:
            pipe.send(task)
            while True:
                if not pipe.poll(limit):
                    self._kill()
                    return Failure(f"it took more than {limit:.0f} s", who)
                kind, value = pipe.recv()
                if kind == "say":
                    text, who, seconds = value
                    limit = self._silence_s if seconds is None else seconds + self._margin_s
                    channel.say(text, who, seconds)
                elif kind == "found":
                    channel.found(value)
                elif kind == "done":
                    return None
                elif kind == "failed":
                    self._kill()
                    return Failure(value, who)
                else:
                    self._kill()
                    raise RuntimeError(f"the worker process raised\n{value}")
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return Failure(self._last_words(), who)
        except KeyboardInterrupt:
            self._drain(channel)
            raise

    def _drain(self, channel: Channel) -> None:
        """Take over what the process had found before it was interrupted."""
        with contextlib.suppress(EOFError, OSError):
            while self._pipe is not None and self._pipe.poll(0):
                kind, value = self._pipe.recv()
                if kind == "found":
                    channel.found(value)

    def _last_words(self) -> str:
        """Say how a process ended that nobody had asked to."""
        self._process.join(END_S)
        code = self._process.exitcode
        self._kill()
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(END_S)
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def close(self) -> None:
        """End the process."""
        self._kill()


class _Pipe:
    """The channel's end in the process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def say(self, text: str, who: str = "", seconds: float | None = None) -> None:
        self._pipe.send(("say", (text, who, seconds)))

    def found(self, item: Any) -> None:
        self._pipe.send(("found", item))


def _serve(make: Callable[[], Session], pipe: Connection) -> None:
    """Run tasks until nobody sends any: what the process does. Ctrl-C is for the one that asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel, session = _Pipe(pipe), None
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        answer: tuple[str, str | None] = ("done", None)
        try:
            session = session or make()
            session.run(task, channel)
        except DeviceFailed as failed:
            answer = ("failed", str(failed))
        except Exception:  # nothing is swallowed: whoever asked raises it, with this traceback
            answer = ("raised", traceback.format_exc())
        with contextlib.suppress(OSError):
            pipe.send(answer)
