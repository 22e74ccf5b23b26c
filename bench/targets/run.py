"""``python -m bench targets``: measures what the targets compare, judges them, writes records and verdicts."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..cli import device_of, some_of
from ..ops.collect import Collected, left_to_do, run_tasks
from ..ops.output import print_end
from ..ops.plan import Task
from ..ops.session import Settings
from ..progress import Progress, console_for
from ..providers.registry import Provider, all_providers
from ..records import environment
from ..records.devices import DEFAULT_DTYPE
from ..records.files import results_folder
from ..records.record import Measurement
from ..records.resume import UNFINISHED, standing
from ..records.store import Store, earlier_records
from ..records.targets import KINDS, OURS, TARGETS, Target, Verdict, cells, importance
from ..workloads import Workload
from .verdicts import judge

FILE = "targets.json"
SECONDS = {"cpu": 6.0, "cuda": 0.5}  # of repetitions, for each provider of a workload in a mode
AT_LEAST = 3  # repetitions; the slowest calls take a minute
COMPILE_MINUTES = {"cpu": 15.0, "cuda": 12.0}
COLOURS = {"met": "green", "MISSED": "red", "not measured": "yellow", "no target": None}


@dataclass(frozen=True)
class Choice:
    """A choice of targets, and how they are measured.

    Attributes:
        device: "cpu" or "cuda".
        targets: to judge.
        compile: False leaves out whoever compiles.
        compiled_only: only workloads that somebody compiles.
        compile_minutes: until a provider that compiles has a first result; None takes the device's.
        minutes: nothing new begins after that long.
        quick: a smoke test.
    """

    device: str
    targets: tuple[Target, ...]
    compile: bool = True
    compiled_only: bool = False
    compile_minutes: float | None = None
    minutes: float | None = None
    quick: bool = False

    @property
    def whole(self) -> bool:
        """Tell whether nothing is left out."""
        return len(self.targets) == len(TARGETS) and self.compile and not (self.quick or self.compiled_only)

    def settings(self, started: float) -> Settings:
        """Return what is fixed for the run; the minutes count from ``started``."""
        return Settings(
            self.device,
            (DEFAULT_DTYPE[self.device],),
            self.quick,
            seconds=SECONDS[self.device],
            at_least=AT_LEAST,
            compile_seconds=60 * (self.compile_minutes or COMPILE_MINUTES[self.device]),
            end=None if self.minutes is None else started + 60 * self.minutes,
        )


def choose(device: str, only: Sequence[str], *, listing: bool = False, **more: Any) -> Choice:
    """Check what is asked for.

    Raises:
        BadOption: an unknown name, or CUDA without a device.
    """
    chosen = set(some_of("--only", only or ["*"], [target.name for target in TARGETS]))
    device = device_of(device, listing=listing)
    return Choice(device, tuple(target for target in TARGETS if target.name in chosen), **more)


def grouped(targets: Sequence[Target]) -> dict[Workload, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return modes and providers of each workload, the most important first."""
    found: dict[Workload, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for target in sorted((one for one in targets if one.mode), key=lambda one: importance(one.workload)):
        modes, providers = found.get(target.workload, ((), (OURS,)))
        found[target.workload] = (
            tuple(dict.fromkeys((*modes, target.mode))),
            tuple(dict.fromkeys((*providers, *target.against))),
        )
    return found


def tasks_of(choice: Choice) -> list[Task]:
    """List the tasks; a workload has none where everybody that ours is compared with compiles and is left out."""
    everyone, tasks = all_providers(), []
    for workload, (modes, names) in grouped(choice.targets).items():
        providers = [everyone[name] for name in everyone if name in names]
        if choice.compiled_only and not any(one.compiles for one in providers):
            continue
        if not choice.compile:
            providers = [one for one in providers if not one.compiles]
        if providers and (choice.compile or _says_something(choice, workload, providers)):
            chosen = tuple(one.name for one in providers)
            tasks.append(Task(workload, modes, DEFAULT_DTYPE[choice.device], chosen))
    return tasks


def _says_something(choice: Choice, workload: Workload, providers: Sequence[Provider]) -> bool:
    """Tell whether ours is compared with somebody, or with the device's limits."""
    return len(providers) > 1 or any(
        one.kind == "roofline" and one.workload == workload for one in choice.targets if one.mode
    )


def run(choice: Choice, *, out: Path | None, record: bool, add: bool, resume: bool = False) -> int:
    """Measure, judge, print, write.

    Args:
        choice: what is asked for.
        out: folder of the file.
        record: write to the device's committed folder.
        add: keep what the file holds and this run has no row for.
        resume: keep it, and measure nothing again that was measured at this commit on this device.

    Returns:
        0, since a missed target is a result; 1 if a provider or the device failed; 75 if a run that resumes did not
        reach everything; 130 after Ctrl-C, with what was measured written.

    Raises:
        BadFile: the records of before can't be read.
    """
    started = time.monotonic()
    facts = environment.describe(choice.device)
    path = results_folder(facts["device"], out=out, record=record) / FILE
    store = Store([path], own=[] if add or resume else [path], beside=lambda found: verdicts_of(found, choice.device))
    settings, tasks, interrupted = choice.settings(started), tasks_of(choice), False
    if resume:
        everything, tasks = tasks, left_to_do(tasks, standing(earlier_records(path), facts), choice.device)
        print(f"{len(tasks)} of {len(everything)} workloads are left to do", flush=True)
    with Progress(len(tasks), left=lambda: settings.left if choice.minutes else None) as progress:
        found = Collected(facts, progress)
        try:
            run_tasks(tasks, settings, found, lambda: store.save(found.records))
        except KeyboardInterrupt:
            interrupted = True
    records, console = found.records, console_for(sys.stdout)
    store.save(records)
    for name in found.not_begun:
        console.print(f"not begun, the time is over: {name}", highlight=False, markup=False)
    print_table([judge(target, store.all(records), choice.device) for target in choice.targets], console)
    print_end(interrupted, found.failures, store.paths if records else [], time.monotonic() - started, console)
    if interrupted:
        return 130
    if found.failures or any(row.status == "failed" for row in records):
        return 1
    return UNFINISHED if resume and found.over else 0


def verdicts_of(records: Sequence[Measurement], device: str) -> dict[str, Any]:
    """Judge every target by a file's records: what stands beside them."""
    return {"targets": [judge(target, records, device).to_dict() for target in TARGETS]}


def print_list(targets: Sequence[Target], console: Console) -> None:
    """Print the targets."""
    for target in targets:
        what, sense = KINDS[target.kind]
        line = (
            f"{target.name}  {target.op} {target.case} {target.mode}  {what} ({', '.join(target.against)}) "
            f"{sense} cpu {target.cpu or '-'}, cuda {target.cuda or '-'}"
        )
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_table(verdicts: Sequence[Verdict], console: Console) -> None:
    """Print target, ratio and verdict."""
    header, rows = cells([one.to_dict() for one in verdicts])
    table = Table(title="targets", title_justify="left", pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold", justify="right" if name in ("must be", "measured") else "left")
    for one, row in zip(verdicts, rows, strict=True):
        table.add_row(*(cell.replace("[", "\\[") for cell in row), style=COLOURS[one.verdict])
    console.print(table)
    counts = {word: sum(one.verdict == word for one in verdicts) for word in COLOURS}
    console.print(", ".join(f"{count} {word}" for word, count in counts.items()))
