"""The steps of a run on a GPU: processes with deadlines, one after the other."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..records import resume
from ..records.environment import REPOSITORY

GRACE_S = 8.0  # between asking a step to stop and ending it
SECONDS, MINUTES = "{seconds}", "{minutes}"
MARGIN_S = 15.0  # for a step to start and to finish what it is at
OK, FAILED, UNFINISHED, NOT_BEGUN, LEFT_OUT = "ok", "failed", "unfinished", "not begun", "left out"
STATUSES = (OK, FAILED, UNFINISHED, NOT_BEGUN, LEFT_OUT)


@dataclass(frozen=True)
class Step:
    """A command with a deadline.

    Attributes:
        name: of the step and its log.
        command: without the interpreter: arguments of Python; "{seconds}" and "{minutes}" become what it may
            take, less a margin.
        at_most_s: its own deadline, seconds.
        needs: packages without which it is left out.
        without: packages it can do without, and what is lost then.
        skip: why it is left out; None if it isn't.
        again: runs each time, however it ended before.
    """

    name: str
    command: tuple[str, ...]
    at_most_s: float
    needs: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    skip: str | None = None
    again: bool = False


@dataclass(frozen=True)
class Done:
    """The end of a step.

    Attributes:
        name: of the step.
        status: of :data:`STATUSES`.
        detail: exit code, reason, or nothing.
        seconds: it took.
        date: when it ended, in UTC.
    """

    name: str
    status: str
    detail: str
    seconds: float
    date: str = ""

    @property
    def is_left_to_do(self) -> bool:
        """Tell whether a rerun goes on with it."""
        return self.status in (UNFINISHED, NOT_BEGUN)


def run_step(
    step: Step,
    seconds: float,
    log: Path,
    environment: dict[str, str],
    waiting: Callable[[float], None] = lambda _seconds: None,
) -> Done:
    """Run a step in a process group of its own; at its deadline ask it to stop, as Ctrl-C does, and then end it.

    Args:
        step: what to run.
        seconds: it may take.
        log: of its output.
        environment: variables.
        waiting: told about every second how long it has run.
    """
    started = time.monotonic()
    code = _run(step, seconds, log, environment, waiting)
    taken = time.monotonic() - started
    failed = failed_tests(log) if "pytest" in step.command else 0
    status, detail = FAILED, f"exit code {code}"
    if code is None and failed:
        detail = f"{failed} tests had failed when it was stopped after {seconds:.0f} s"
    elif code is None:
        status, detail = UNFINISHED, f"stopped after {seconds:.0f} s; what it had done is written"
    elif code == resume.UNFINISHED:
        status, detail = UNFINISHED, "the time was over before everything was reached"
    elif code == 0:
        status, detail = OK, ""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Done(step.name, status, detail, taken, now)


def _run(
    step: Step, seconds: float, log: Path, environment: dict[str, str], waiting: Callable[[float], None]
) -> int | None:
    """Return its exit code; None if it had to be stopped."""
    command = [sys.executable, *arguments_of(step, seconds)]
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=interruptible,
        )
        try:
            while (taken := time.monotonic() - started) < seconds:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=min(1.0, seconds - taken))
                waiting(taken)
            return None
        finally:
            stop(process)


def arguments_of(step: Step, seconds: float) -> list[str]:
    """Return the step's arguments of Python where it may take so long."""
    own = max(1, round(seconds - MARGIN_S))
    known = {SECONDS: str(own), MINUTES: f"{own / 60:.2f}"}
    return [known.get(part, part) for part in step.command]


def shown_command(step: Step, seconds: float) -> str:
    """Return the step's command, to be run by hand."""
    return shlex.join(["python", *arguments_of(step, seconds)])


def failed_tests(log: Path) -> int:
    """Count tests that had failed, by pytest's last line or, where it was ended before that, by its letters."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        if re.search(r" in \d+\.\d+s\b", line):
            return sum(int(number) for number in re.findall(r"(\d+) (?:failed|error)", line))
    letters = [line for line in lines if re.fullmatch(r"[.FEsxX]+(\s+\[\s*\d+%\])?", line.strip())]
    return sum(line.count("F") + line.count("E") for line in letters)


def interruptible() -> None:
    """Undo what nohup and a shell's ``&`` do to their children, or a step couldn't be asked to stop."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the group and wait a little, then kill it."""
    for sign, wait in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            break
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=wait)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    # children of a step that ended by itself
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Let a request to end, as ``timeout`` and batch systems send it, stop the step that runs, as Ctrl-C does."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def child_environment() -> dict[str, str]:
    """Return this environment, with the checkout's sources first."""
    paths = [str(REPOSITORY), str(REPOSITORY / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def tail(log: Path, lines: int = 12) -> str:
    """Return the end of a log, indented."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join("    " + line[:200] for line in text[-lines:])
