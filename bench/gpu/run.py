"""The run of ``make gpu`` on a machine with a CUDA GPU: build, GPU tests, benchmarks, in minutes, installing nothing.

Every step has a deadline, the most important come first, and what a step has done is on disk if it is cut off; the next
run goes on there. A step whose packages are missing is left out, aloud. torch is imported late, since that counts too.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..cli import BadOption
from ..progress import Progress
from ..records import files
from ..records.environment import cpu_name
from ..records.files import results_folder
from .available import build_skipped, cuda_devices, cuda_target, find_nvcc, missing, native_sources
from .plan import PASSED, chosen, plan
from .state import State, identity_of, left_to_do
from .steps import (
    FAILED,
    LEFT_OUT,
    NOT_BEGUN,
    OK,
    Done,
    Step,
    child_environment,
    ended_like_ctrl_c,
    run_step,
    shown_command,
    tail,
)
from .tables import furthest_table, summary, verdict_table

RESERVE_S = 25.0  # to end the last step, and for the tables
LEAST_S = 20.0  # a step that has less would end before it has begun


def run_all(
    steps: Sequence[Step],
    state: State,
    seconds: float,
    results: list[Done],
    *,
    lacking: Callable[[Iterable[str]], list[str]] = missing,
) -> None:
    """Run the steps one after the other, and keep ``gpu.json`` up to date.

    Args:
        steps: of :func:`~bench.gpu.plan.plan`.
        state: what earlier runs did; logs go beside its file.
        seconds: for all of them.
        results: how each went is added.
        lacking: which of some packages are missing.
    """
    logs = state.path.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    steps = [_left_out(step, lacking(step.needs)) for step in steps]
    with Progress(len(steps), left=lambda: end - time.monotonic()) as progress:
        for step in steps:
            left = end - time.monotonic() - RESERVE_S
            before = state.finished(step)
            if before is not None:
                done = dataclasses.replace(before, detail=f"done before, {before.date}; --fresh runs it again")
            elif step.skip is not None:
                done = Done(step.name, LEFT_OUT, step.skip, 0.0)
            elif left < min(LEAST_S, step.at_most_s):
                done = Done(step.name, NOT_BEGUN, f"no time left of {seconds:.0f} s", 0.0)
            else:
                lost = lacking(step.without)
                if lost:
                    print(f"{step.name}: goes on without {', '.join(lost)}", flush=True)
                done = _shown(step, min(step.at_most_s, left), logs / f"{step.name}.log", progress)
            detail = f", {done.detail}" if done.detail else ""
            print(f"{step.name}: {done.status}{detail} ({done.seconds:.0f} s)", flush=True)
            progress.done()
            results.append(done)
            if before is None and not (done.status == NOT_BEGUN and step.name in state.steps):
                state.add(done)


def _left_out(step: Step, absent: Sequence[str]) -> Step:
    """Return a step that is left out if packages are missing and nothing else is in its way."""
    if step.skip is not None or not absent:
        return step
    return dataclasses.replace(step, skip=f"not installed here: {', '.join(absent)}")


def _shown(step: Step, seconds: float, log: Path, progress: Progress) -> Done:
    """Run a step, and print what it is and the end of its log where that says something."""
    print(f"{step.name}: {shown_command(step, seconds)} (at most {seconds:.0f} s)", flush=True)
    progress.step(step.name)
    done = run_step(
        step, seconds, log, child_environment(), lambda taken: progress.detail(f"{taken:.0f} of {seconds:.0f} s")
    )
    if done.status != OK or step.name in ("info", "tests"):
        print(tail(log), flush=True)
    return done


def run(
    device: str,
    *,
    out: Path | None,
    record: bool,
    seconds: float,
    only: Sequence[str],
    listing: bool,
    fresh: bool = False,
    devices: Sequence[str] | None = None,
) -> int:
    """Run the steps.

    Args:
        device: "cuda", or "cpu" to try them.
        out: folder of records and logs.
        record: write to the device's committed folder.
        seconds: for everything.
        only: these steps.
        listing: print them and stop.
        fresh: run what was done before, too.
        devices: names of CUDA devices, for a try without any; None asks torch.

    Returns:
        0; 1 if a step failed, or there is something left to do; 130 after Ctrl-C.

    Raises:
        BadOption: there is no device, or no such step.
    """
    started, since = time.monotonic(), datetime.datetime.now(datetime.timezone.utc)
    found = cuda_devices() if devices is None and device == "cuda" else list(devices or ())
    name = found[0] if found else cpu_name()
    trial = files.OUT / "trial" if device == "cpu" else None
    folder = results_folder(name, out=out or trial, record=record).resolve()
    target = cuda_target() if devices is None and device == "cuda" else None
    build = build_skipped(find_nvcc(), native_sources())
    steps = chosen(plan(device, found, folder, build, target, fresh=fresh), only)
    if listing:
        for step in steps:
            print(
                f"{step.name:<11} at most {step.at_most_s:4.0f} s  {step.skip or shown_command(step, step.at_most_s)}"
            )
        return 0
    print(f"{name}; records and logs in {folder}; at most {seconds:.0f} s", flush=True)
    try:
        identity = identity_of(name)
    except ValueError as error:  # of BENCH_COMMIT
        raise BadOption(str(error)) from None
    state = State.read(folder, identity, fresh=fresh)
    if state.note:
        print(f"starts again: {state.note}", flush=True)
    if not state.steps or fresh:
        (folder / PASSED).unlink(missing_ok=True)
    results: list[Done] = []
    try:
        with ended_like_ctrl_c():
            run_all(steps, state, seconds - (time.monotonic() - started), results)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    scope = since if state.identity is None else state.identity
    tables = [summary(results), verdict_table(folder, device, scope), furthest_table(folder, scope)]
    print("\n".join(line for table in tables for line in ("", *table)), flush=True)
    return _ended(results, interrupted=interrupted)


def _ended(results: Sequence[Done], *, interrupted: bool) -> int:
    """Say what is left to do; return the exit code."""
    left = left_to_do(results)
    if interrupted:
        print("interrupted: what was measured is kept; run it again: it goes on", flush=True)
        return 130
    if left:
        print(f"not finished: {', '.join(left)}; run it again: it goes on", flush=True)
    return 1 if left or any(done.status == FAILED for done in results) else 0
