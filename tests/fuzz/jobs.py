"""Some cases of one function by one backend, drawn and shrunk by hypothesis."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import engine

from tests.fuzz.case import Case
from tests.fuzz.check import CHECKED, REFUSED, Fault, check
from tests.fuzz.strategies import invalid, valid

VALID, INVALID = "valid", "invalid"
DRAWN = {VALID: valid, INVALID: invalid}
SHRINKING_S = 60  # what a fault may take of a campaign


@dataclass(frozen=True)
class Job:
    """The cases that one process does at a time.

    Attributes:
        function: a key of ``SUBJECTS``.
        backend: that is forced, or "auto".
        kind: "valid" or "invalid" calls.
        cases: how many.
        seed: of hypothesis.
    """

    function: str
    backend: str
    kind: str
    cases: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The result of a job.

    Attributes:
        checked: calls that were compared, or that raised as they should.
        refused: calls that the backend said it can't serve.
        seconds: they took.
        fault: what is wrong; "" if nothing is.
        program: Python that shows it.
    """

    checked: int = 0
    refused: int = 0
    seconds: float = 0.0
    fault: str = ""
    program: str = ""

    def asdict(self) -> dict[str, Any]:
        """Return plain values, for another process."""
        return asdict(self)


def run(job: Job, note: Callable[[Case], None] = lambda case: None) -> Outcome:
    """Draw and check the cases of a job; the first fault ends it, made as small as it gets.

    Args:
        job: what to do.
        note: is told each case before it runs, for those that end the process.
    """
    engine.MAX_SHRINKING_SECONDS = SHRINKING_S
    counts: Counter[str] = Counter()
    latest: list[Case] = []
    is_shrinking: list[bool] = []

    @seed(job.seed)
    @settings(
        max_examples=job.cases,
        phases=[Phase.generate, Phase.shrink],
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def examine(data: st.DataObject) -> None:
        case = DRAWN[job.kind](data.draw, job.function, job.backend)
        latest[:] = [case]
        note(case)
        try:
            verdict = check(case)
        except Fault:
            is_shrinking.append(True)
            raise
        if not is_shrinking:
            counts[verdict] += 1

    started, fault, program = time.monotonic(), "", ""
    try:
        examine()
    except Fault as found:  # of the last call, which is the smallest
        fault, program = str(found), latest[0].program()
    return Outcome(counts[CHECKED], counts[REFUSED], time.monotonic() - started, fault, program)
