"""The tests that catch each fault: every fault in a copy of the tree, a few copies at a time."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from .mutant import Mutant
from .trees import EXTENSION, Processes, Report, Tree, TreeError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Verdict:
    """The outcome of one fault.

    Attributes:
        mutant: the fault.
        caught_by: node ids of tests that failed by an assertion; empty if it was not caught.
        problem: why it was not, in words.
        seconds: that it took.
    """

    mutant: Mutant
    caught_by: tuple[str, ...]
    problem: str
    seconds: float


def examine(root: Path, mutants: Sequence[Mutant], jobs: int, say: Say, *, keep: bool = False) -> list[Verdict]:
    """Find every fault's verdict, in the order of ``mutants``.

    Args:
        root: of the working tree, which is read and never written.
        mutants: to look at.
        jobs: copies that work at the same time.
        say: takes a line of progress.
        keep: leave the copies, and a single fault in its copy.

    Raises:
        StaleFault: the code of a fault is not there.
        TreeError: the copies can't be made, or a listed test does not pass without a fault.
    """
    for mutant in mutants:
        mutant.applied((root / mutant.file).read_text(encoding="utf-8"))
    with ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="hia-mutants-") if keep else None
        folder = folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="hia-mutants-"))
        processes = Processes()
        stack.callback(processes.end)  # before the folder goes
        if keep:
            say(f"copies, which stay: {folder}")
        trees = [Tree(Path(folder) / f"tree-{number}", root, processes) for number in range(min(jobs, len(mutants)))]
        trees[0].check_sources()
        if any(mutant.native for mutant in mutants):
            say("compiling csrc/")
            _compile(trees)
        _require_green(trees, mutants, say)
        return _Rounds(trees, mutants, say, keep=keep and len(mutants) == 1).verdicts()


def _compile(trees: Sequence[Tree]) -> None:
    """Compile csrc/ in the first copy, where its faults will be built; the others get that extension."""
    first = trees[0]
    first.build()
    for tree in trees[1:]:
        for path in tree.folder.glob(EXTENSION):
            path.unlink()
        for path, content in first.extension().items():
            (tree.folder / path.relative_to(first.folder)).write_bytes(content)


def _require_green(trees: Sequence[Tree], mutants: Sequence[Mutant], say: Say) -> None:
    """Raise unless every listed test passes without a fault: what fails anyway catches nothing."""
    say("the listed tests without a fault")
    reports: dict[bool, Report] = {}
    raised: list[Exception] = []

    def run(tree: Tree, interpreter: bool, tests: list[str]) -> None:
        try:
            reports[interpreter] = tree.pytest(tests, interpreter=interpreter, first_failure=False)
        except Exception as error:
            raised.append(error)

    sets = {
        kind: list(dict.fromkeys(test for m in mutants if m.interpreter is kind for test in m.tests))
        for kind in (True, False)
    }
    runs = [(trees[number % len(trees)], kind, tests) for number, (kind, tests) in enumerate(sets.items()) if tests]
    threads = [threading.Thread(target=run, args=one, daemon=True) for one in runs]
    for thread in threads:
        thread.start()
        if len(trees) == 1:
            _join([thread])
    _join(threads)
    if raised:
        raise raised[0]
    for report in reports.values():
        if report.code != 0:
            raise TreeError(f"mutants: the listed tests must pass without a fault, got {report.failure()}")
    for mutant in mutants:
        for test in mutant.tests:
            if not reports[mutant.interpreter].passed_of(test):
                raise TreeError(
                    f"mutants: {mutant.name}'s test {test} must run and pass without the fault, got none that did; "
                    "is it skipped here?"
                )


def _join(threads: Sequence[threading.Thread]) -> None:
    """Wait, in steps: a thread that is waited for without an end keeps Ctrl-C out."""
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)


class _Rounds:
    """Faults dealt out to the copies; those in csrc/ go to the first, which holds what was compiled."""

    def __init__(self, trees: Sequence[Tree], mutants: Sequence[Mutant], say: Say, *, keep: bool) -> None:
        self.trees, self.mutants, self.say, self.keep = trees, mutants, say, keep
        self.native = deque(m for m in mutants if m.native)
        self.others = deque(m for m in mutants if not m.native)
        self.found: dict[str, Verdict] = {}
        self.lock, self.stopped = threading.Lock(), False
        self.raised: Exception | None = None

    def verdicts(self) -> list[Verdict]:
        threads = [
            threading.Thread(target=self._work, args=(tree, number == 0), daemon=True)
            for number, tree in enumerate(self.trees)
        ]
        try:
            for thread in threads:
                thread.start()
            _join(threads)
        finally:
            self.stopped = True
            self.trees[0].processes.end()
            _join(threads)
        if self.raised is not None:
            raise self.raised
        return [self.found[mutant.name] for mutant in self.mutants]

    def _next(self, builds: bool) -> Mutant | None:
        with self.lock:
            if self.stopped:
                return None
            if builds and self.native:
                return self.native.popleft()
            return self.others.popleft() if self.others else None

    def _work(self, tree: Tree, builds: bool) -> None:
        try:
            while (mutant := self._next(builds)) is not None:
                began = time.perf_counter()
                with tree.changed(mutant, keep=self.keep):
                    report = tree.pytest(mutant.tests, interpreter=mutant.interpreter, first_failure=True)
                self._note(mutant, report, time.perf_counter() - began)
        except Exception as error:
            self.stopped, self.raised = True, error

    def _note(self, mutant: Mutant, report: Report, seconds: float) -> None:
        caught = tuple(report.caught_by())
        verdict = Verdict(mutant, caught, "" if caught else report.problem(), seconds)
        with self.lock:
            if self.stopped:  # killed, so it says nothing
                return
            self.found[mutant.name] = verdict
            count = f"[{len(self.found):{len(str(len(self.mutants)))}}/{len(self.mutants)}]"
        words = f"caught by {', '.join(caught)}" if caught else f"NOT CAUGHT: {verdict.problem}"
        self.say(f"{count} {seconds:5.1f} s  {mutant.name}: {words}")
