"""A campaign: jobs for every call that can run here, shared among processes; a process that dies is a fault."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.fuzz.jobs import INVALID, VALID, Job, Outcome

ROOT = Path(__file__).resolve().parents[2]
WORKER = (sys.executable, "-m", "tests.fuzz.worker")
PLAIN, INTERPRETED = "plain", "interpreted"
INTERPRETED_SHARE, INVALID_SHARE = 0.05, 0.15  # of the cases; one in the interpreter takes tens of others' time
LARGEST_JOB = 100
ANSWER_S = 600  # after which a process counts as hanging
SAID_EVERY_S = 15

Calls = list[tuple[str, str]]


class Died(RuntimeError):
    """A process ended, or was ended, before it had answered."""


class Worker:
    """A process that runs jobs.

    Args:
        kind: "plain", or "interpreted": with Triton's interpreter.
        folder: for the case that runs.
        command: that starts it.
    """

    def __init__(self, kind: str, folder: Path, command: Sequence[str] = WORKER) -> None:
        self._latest = folder / f"{kind}-{threading.get_ident()}.py"
        self._latest.write_text("", encoding="utf-8")
        paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "HIA_TUNED": "0"}
        environment.pop("HIA_BACKEND", None)
        environment["TRITON_INTERPRET"] = "1" if kind == INTERPRETED else "0"
        self._process = subprocess.Popen(
            [*command, str(self._latest)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.calls: Calls = [(function, backend) for function, backend in self._answer()]

    def run(self, job: Job) -> Outcome:
        """Run a job; where the process dies, name the case."""
        try:
            print(json.dumps(asdict(job)), file=self._process.stdin)
            return Outcome(**self._answer())
        except (Died, BrokenPipeError) as error:
            code = self._process.wait()
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Outcome(fault=f"the process died: {name}; {error}", program=self._latest.read_text("utf-8"))

    def _answer(self):
        timer = threading.Timer(ANSWER_S, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise Died(f"no answer within {ANSWER_S} s, or none at all")
        return json.loads(line)

    @property
    def is_alive(self) -> bool:
        """Tell whether it can take another job."""
        return self._process.poll() is None

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def plan(calls: dict[str, Calls], cases: int, seed: int) -> list[tuple[str, Job]]:
    """Share cases among the calls of each kind of process: as many for one op as for another, then equally.

    Args:
        calls: function and backend, by kind of process.
        cases: in all.
        seed: of the campaign; each job has another that follows from it.
    """
    interpreted = round(cases * INTERPRETED_SHARE) if calls[INTERPRETED] and calls[PLAIN] else 0
    wanted = {INTERPRETED: interpreted or (cases if calls[INTERPRETED] else 0), PLAIN: cases - interpreted}
    jobs: list[tuple[str, Job]] = []
    for kind in (INTERPRETED, PLAIN):  # what takes longest begins first
        share = _shares(calls[kind], wanted[kind])
        for (function, backend), number in share.items():
            wrong = round(number * INVALID_SHARE)
            for which, rest in ((VALID, number - wrong), (INVALID, wrong)):
                while rest > 0:
                    size = min(rest, LARGEST_JOB)
                    jobs.append((kind, Job(function, backend, which, size, seed + len(jobs))))
                    rest -= size
    return jobs


def _shares(calls: Calls, cases: int) -> Counter[tuple[str, str]]:
    """Share so that the sum is exact; every call has one case at least."""
    from tests.fuzz.subjects import SUBJECTS

    by_op: dict[str, Calls] = defaultdict(list)
    for function, backend in calls:
        by_op[SUBJECTS[function].op].append((function, backend))
    found: Counter[tuple[str, str]] = Counter()
    left = cases
    for position, of_op in enumerate(by_op.values()):
        mine = left // (len(by_op) - position)
        left -= mine
        for place, call in enumerate(of_op):
            found[call] = max(1, mine // (len(of_op) - place))
            mine -= found[call]
    return found


@dataclass
class Campaign:
    """The jobs of a campaign, and what came of them.

    Attributes:
        workers: jobs that run at once.
        jobs: what is left to do.
        outcomes: of what is done.
    """

    workers: int
    jobs: list[tuple[str, Job]]
    outcomes: list[tuple[Job, Outcome]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock, self._folder = threading.Lock(), Path(tempfile.mkdtemp(prefix="hia-fuzz-"))
        self._all = sum(job.cases for _, job in self.jobs)
        self._running: list[Worker] = []
        self._is_over = False
        self._started = time.monotonic()

    def run(self) -> None:
        """Run every job; faults are said as they are found."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(SAID_EVERY_S / len(threads))
                self._say()
        finally:
            with self._lock:
                self._is_over = True
                self.jobs.clear()
            for worker in self._running:
                worker.end()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _work(self) -> None:
        mine: dict[str, Worker] = {}
        while True:
            with self._lock:
                if not self.jobs:
                    return
                kind, job = self.jobs.pop(0)
            if kind not in mine or not mine[kind].is_alive:
                mine[kind] = Worker(kind, self._folder)
                self._running.append(mine[kind])
            outcome = mine[kind].run(job)
            with self._lock:
                if self._is_over:  # interrupted: the process did not die by itself
                    return
                self.outcomes.append((job, outcome))
                if outcome.fault:
                    self._say_fault(job, outcome)

    def _say(self) -> None:
        done = sum(outcome.checked + outcome.refused for _, outcome in self.outcomes)
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        print(f"{minutes:>3}:{seconds:02} {done} of {self._all} cases, {self.faults} faults", flush=True)

    @staticmethod
    def _say_fault(job: Job, outcome: Outcome) -> None:
        print(f"\nFAULT {job.function} by {job.backend} (seed {job.seed}): {outcome.fault}")
        print(f"\n{outcome.program}\n", flush=True)

    @property
    def faults(self) -> int:
        """Count what was found."""
        return sum(bool(outcome.fault) for _, outcome in self.outcomes)


def table(outcomes: Sequence[tuple[Job, Outcome]]) -> str:
    """Format cases by function and backend: compared, wrong calls, those that a backend refused, and faults."""
    header = ("function", "backend", "compared", "wrong calls", "refused", "ms a case", "faults")
    rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0, 0.0, 0])
    for job, outcome in outcomes:
        for row in (rows[job.function, job.backend], rows["all", ""]):
            row[0 if job.kind == VALID else 1] += outcome.checked
            row[2] += outcome.refused
            row[3] += outcome.seconds
            row[4] += bool(outcome.fault)
    lines = [header]
    for (function, backend), (valid, wrong, refused, seconds, faults) in rows.items():
        if function != "all":
            lines.append(_row(function, backend, valid, wrong, refused, seconds, faults))
    lines = [header, *sorted(lines[1:])]
    if rows:
        lines.append(_row("all", "", *rows["all", ""]))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in enumerate(zipped))
        for zipped in (list(zip(line, widths, strict=True)) for line in lines)
    )


def _row(
    function: str, backend: str, valid: float, wrong: float, refused: float, seconds: float, faults: float
) -> tuple[str, ...]:
    took = 1e3 * seconds / max(valid + wrong + refused, 1)
    return (function, backend, *(f"{int(x):,}" for x in (valid, wrong, refused)), f"{took:.0f}", f"{int(faults)}")


def calls_here(folder: Path) -> dict[str, Calls]:
    """Ask a process of each kind what it can call."""
    kinds = [PLAIN, INTERPRETED] if importlib.util.find_spec("triton") is not None else [PLAIN]
    found: dict[str, Calls] = {PLAIN: [], INTERPRETED: []}
    for kind in kinds:
        worker = Worker(kind, folder)
        found[kind] = worker.calls
        worker.end()
    return found
