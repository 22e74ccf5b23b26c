"""``python -m bench gpu --rehearse``: every step's Python on a GPU that isn't there, down to its kernels' launches.

The steps' own commands are parsed and run, each in a process of its own; what a fake device cannot do is in
:mod:`bench.gpu.stand_ins`. Tests are collected, not run. A step that raises, measures a failure or launches nothing
fails the rehearsal.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from unittest import mock

from ..records import environment
from ..records.environment import REPOSITORY
from ..records.files import OUT, read_json
from .plan import chosen, plan
from .steps import MINUTES, SECONDS, Step, child_environment, shown_command

FOLDER = OUT / "rehearsal"
TIME = {MINUTES: "60", SECONDS: "3600"}  # nothing is cut off
# every op, composite and provider at their smallest shapes: the Python is the same, at all shapes it takes an hour
SHORTER = {"ops": ("--quick",)}
AT_ONCE = 2  # steps; each takes 1 to 2 GB
# the longest first, so that the others fill the second process
ORDER = ("tune", "compiled", "targets", "compile", "table3", "smoke", "end-to-end", "tests", "ops")
RECORDS = ("targets.json", "kernels.json", "end_to_end.json")


@dataclass(frozen=True)
class Walked:
    """A step of the rehearsal.

    Attributes:
        name: of the step.
        what: that was walked, in words.
        problems: why it failed; none if it didn't.
        seconds: it took.
    """

    name: str
    what: str
    problems: tuple[str, ...]
    seconds: float


def walk(step: Step, target: str, folder: Path) -> Walked:
    """Walk a step in this process; its output goes to a log in the folder."""
    started = time.monotonic()
    command = [TIME.get(part, part) for part in (*step.command, *SHORTER.get(step.name, ()))]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("w", encoding="utf-8") as log:
        if command[:2] == ["-m", "bench"]:
            what, problems = _walk_bench(command[2:], target, folder, log)
        else:
            what, problems = _walk_other(command, log)
    return Walked(step.name, what, tuple(problems), time.monotonic() - started)


def _walk_bench(arguments: list[str], target: str, folder: Path, log: TextIO) -> tuple[str, list[str]]:
    from ..launches.device import TARGETS
    from .stand_ins import rehearsing

    if arguments[0] == "launches":  # it brings its fake device, and compiling is no part of a rehearsal
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = _main([*arguments, "--list"])
        lines = (folder / "log").read_text(encoding="utf-8").splitlines()
        count = sum(line.startswith(f"{target} _") for line in lines)
        return f"{count} launches", [f"exit code {code}"] if code else []
    problems, code, launches = [], None, 0
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            with rehearsing(TARGETS[target]) as recording:
                code = _main(arguments)
            launches = len(recording.launches)
        except BaseException as error:
            traceback.print_exc()
            problems.append(_shortly(error))
    rows, failed = _rows(folder)
    problems += failed + ([f"exit code {code}"] if code else []) + ([] if launches else ["no kernel was launched"])
    return f"{launches} launches" + (f", {rows} rows" if rows else ""), problems


def _main(arguments: list[str]) -> int:
    """Run ``python -m bench`` in this process; return its exit code."""
    with mock.patch.object(sys, "argv", ["bench", *arguments]):
        try:
            runpy.run_module("bench", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 1
    return 0


def _shortly(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]} ({Path(frame.filename).name}:{frame.lineno})"
    )


def _rows(folder: Path) -> tuple[int, list[str]]:
    """Count the rows that a step wrote, and list those that failed."""
    rows = [row for name in RECORDS if (folder / name).exists() for row in read_json(folder / name)["records"]]
    failed = [row for row in rows if row["status"] == "failed"]
    lines = [f"{row['op']} {row['case']} {row['mode']} {row['provider']}: {row['reason']}" for row in failed]
    smoke = folder / "smoke.json"
    results = read_json(smoke)["results"] if smoke.exists() else []
    lines += [f"{one['case']}: {one['problem']}" for one in results if one["status"] == "failed"]
    return len(rows) + len(results), lines


def _walk_other(command: list[str], log: TextIO) -> tuple[str, list[str]]:
    """Run what is no benchmark: of tests, the collection."""
    is_tests = "pytest" in command
    line = [sys.executable, *command, *(["--collect-only", "-p", "tests.pretend_gpu"] if is_tests else [])]
    done = subprocess.run(
        line, cwd=REPOSITORY, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log.write(done.stdout)
    lines = len(done.stdout.splitlines())
    problems = [] if done.returncode == 0 and lines else [f"exit code {done.returncode}, {lines} lines"]
    counted = re.search(r"(\d+)(?:/\d+)? tests? (?:collected|selected)|(\d+)/\d+ tests", done.stdout)
    return (f"{counted.group(0)}" if counted else f"{lines} lines"), problems


def steps_of(target: str, folder: Path, only: Sequence[str] = ()) -> list[Step]:
    """List the steps of ``make gpu`` on such a GPU, each with a folder of its own."""
    from ..launches.device import TARGETS

    names = [step.name for step in plan("cuda", [TARGETS[target].device_name], folder, None, target)]
    found = []
    for name in names:
        steps = plan("cuda", [TARGETS[target].device_name], folder / name, _no_build(), target)
        found += [step for step in chosen(steps, only) if step.name == name]
    return found


def _no_build() -> str:
    return "a rehearsal builds nothing"


def run(target: str, *, only: Sequence[str], out: Path | None, listing: bool = False) -> int:
    """Rehearse, and print the log.

    Args:
        target: of :data:`bench.launches.device.TARGETS`.
        only: these steps.
        out: folder of what the steps write, each below its own name; what was there of a step goes, and nothing else.
        listing: print the steps and stop.

    Returns:
        0; 1 if a step failed.
    """
    folder = (out or FOLDER).resolve()
    steps = steps_of(target, folder, only)
    if listing:
        print("\n".join(f"{step.name:<11} {step.skip or shown_command(step, step.at_most_s)}" for step in steps))
        return 0
    started = time.monotonic()
    facts = ", ".join(f"{name} {version}" for name, version in environment.versions().items() if version)
    commit = environment.commit_of(environment.revision())
    print(f"{environment.command()} at commit {commit}; {os.cpu_count()} cores, {facts}", flush=True)
    todo = [step for step in steps if step.skip is None]
    for step in todo:
        shutil.rmtree(folder / step.name, ignore_errors=True)
    todo.sort(key=lambda step: ORDER.index(step.name) if step.name in ORDER else len(ORDER))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(AT_ONCE, len(todo))), mp_context=context, max_tasks_per_child=1) as pool:
        futures = {step.name: pool.submit(walk, step, target, folder / step.name) for step in todo}
        walked = {name: future.result() for name, future in futures.items()}
    for step in steps:
        print(line_of(step, walked.get(step.name)))
    bad = [name for name, one in walked.items() if one.problems]
    end = f"failed: {', '.join(bad)}; logs in {folder}" if bad else "every step reaches its launches"
    print(f"{len(walked)} steps, {time.monotonic() - started:.0f} s: {end}")
    return 1 if bad else 0


def line_of(step: Step, walked: Walked | None) -> str:
    """Return a step's line, and what is wrong below it."""
    if walked is None:
        return f"{step.name:<11} left out  {step.skip}"
    lines = [f"{step.name:<11} {'FAILED' if walked.problems else 'ok':<9} {walked.seconds:3.0f} s  {walked.what}"]
    return "\n".join([*lines, *(f"    {problem}" for problem in walked.problems[:20])])
