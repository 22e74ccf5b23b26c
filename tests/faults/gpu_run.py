"""Faults in ``make gpu``: a run that says all is well and did not do all."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS = (
    Mutant(
        name="what-was-not-reached-is-a-success",
        kind="missing check",
        file="bench/gpu/steps.py",
        old="elif code == resume.UNFINISHED:",
        new="elif code is resume:",
        tests=("tests/bench/test_gpu.py::test_what_was_not_reached_is_no_success",),
        why="a step that was cut off is not told from one that failed, and its exit code says nothing of what is left",
    ),
    Mutant(
        name="another-commits-rows-count",
        kind="stale cache",
        file="bench/records/resume.py",
        old="return mine is not None and identity(earlier) == mine",
        new="return mine is not None",
        tests=("tests/bench/test_resume.py::test_rows_of_something_else_do_not_count",),
        why="a rerun after a change measures nothing and shows the old numbers",
    ),
    Mutant(
        name="a-kernel-that-nothing-launches-is-right",
        kind="missing check",
        file="bench/smoke/run.py",
        old="verdicts = dict.fromkeys(known, NOT_LAUNCHED)",
        new="verdicts = dict.fromkeys(known, OK)",
        tests=("tests/bench/test_smoke.py::test_verdicts",),
        why="a kernel that no case reaches passes the smoke test",
    ),
    Mutant(
        name="a-name-misspelt-where-only-a-gpu-goes",
        kind="missing check",
        file="bench/profile/run.py",
        old="torch.cuda.synchronize()",
        new="torch.cuda.synchronise()",
        tests=("tests/bench/test_rehearsal.py::test_a_step_reaches_its_launches",),
        why="the first minutes on a GPU go to a typing error",
    ),
    Mutant(
        name="skipped-tests-have-run",
        kind="missing check",
        file="tests/going_on.py",
        old="(self.wrongly_skipped or self.not_run)",
        new="self.not_run",
        tests=("tests/test_going_on.py::test_what_was_skipped_has_not_run",),
        why="a GPU that torch can't see passes all of its tests",
    ),
)
