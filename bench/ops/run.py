"""``python -m bench ops``: every op and composite beside every peer and the device's limits."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from ..progress import Progress, console_for
from ..records import environment
from ..records.files import results_folder
from ..records.resume import UNFINISHED, standing
from ..records.store import Store, earlier_records
from .collect import Collected, is_ours, left_to_do, run_tasks
from .output import print_end, print_failures, print_report
from .plan import Plan
from .session import Settings

FILE = "kernels.json"
COMPILE_SECONDS = {"cpu": 45.0, "cuda": 60.0}  # to a first result, in a run that has to end


def run(
    plan: Plan, *, minutes: float | None, out: Path | None, record: bool, json: Path | None, resume: bool = False
) -> int:
    """Measure, write, print.

    With ``resume``, what the file holds of this commit on this device is not measured again.

    Returns:
        0; 1 if a row of ours failed, or nothing could be measured: a peer that fails is a red row, and named at the
        end; 75 if a run that resumes did not reach everything; 130 after Ctrl-C, with what was measured written.

    Raises:
        BadFile: the records of before can't be read.
    """
    started = time.monotonic()
    console = console_for(sys.stdout)
    facts = environment.describe(plan.device)
    folder = results_folder(facts["device"], out=out, record=record)
    own = [json] if json is not None else []
    store = Store([folder / FILE, *own], own=own)
    tasks, interrupted = plan.tasks(), False
    if resume:
        tasks = left_to_do(tasks, standing(earlier_records(folder / FILE), facts), plan.device)
        console.print(f"{len(tasks)} of {len(plan.tasks())} tasks are left to do", highlight=False)
    settings = settings_of(plan, minutes, started)
    with Progress(len(tasks), left=lambda: settings.left if minutes else None) as progress:
        found = Collected(facts, progress)
        try:
            run_tasks(tasks, settings, found, lambda: store.save(found.records))
        except KeyboardInterrupt:
            interrupted = True
    records = found.records
    store.save(records, complete=not (plan.filtered or resume or interrupted or found.cut))
    print_report(records, found.limits, found.not_begun, console)
    print_failures(records, console)
    print_end(interrupted, found.failures, store.paths if records else [], time.monotonic() - started, console)
    if interrupted:
        return 130
    nothing = bool(tasks) and all(record.status != "ok" for record in records) and not (resume and found.over)
    if nothing or any(record.status == "failed" and is_ours(record) for record in records):
        return 1
    return UNFINISHED if resume and found.over else 0


def settings_of(plan: Plan, minutes: float | None, started: float) -> Settings:
    """Return what is fixed for the run; ``minutes`` count from ``started``."""
    settings = Settings(plan.device, plan.dtypes, plan.quick, saves_time=not plan.filtered)
    if minutes is None:
        return settings
    return replace(settings, compile_seconds=COMPILE_SECONDS[plan.device], end=started + 60 * minutes)
