"""The command ``python -m bench targets``: measures the targets' workloads, judges them, writes the record."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..measure.timing import exact_matmuls
from ..ops.options import DEFAULT_DTYPES, DEVICES, Resume, add_resume, names
from ..ops.output import console_for, earlier_records, merged, print_end
from ..ops.run import OVER, Run, measure_workload, start
from ..providers.registry import all_providers
from ..records import environment
from ..records.record import Measurement, write_records
from ..records.targets import KINDS, OURS, TARGETS, Target, Verdict, cells, importance
from ..workloads import Workload
from .verdicts import judge

FILE = "targets.json"
SECONDS = {"cpu": 6.0, "cuda": 0.5}  # of repetitions, for each provider of a workload in a mode
AT_LEAST = 3  # repetitions; the slowest calls take a minute
COMPILE_MINUTES = {"cpu": 15.0, "cuda": 12.0}
COLOURS = {"met": "green", "MISSED": "red", "not measured": "yellow", "no target": None}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Checked flags; ``targets`` among them.

    Raises:
        SystemExit: a value that isn't allowed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench targets",
        description="The ratios the project is held to, measured and judged. A missed target is a result, not an "
        "error: exit code 1 only if something failed, 130 after Ctrl-C.",
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="cpu, cuda, or auto (default)")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=["*"], help="these targets, or patterns of names")
    compiling = parser.add_mutually_exclusive_group()
    compiling.add_argument("--no-compile", action="store_true", help="leave out whoever compiles")
    compiling.add_argument("--compiled", action="store_true", help="only workloads that somebody compiles")
    parser.add_argument(
        "--compile-minutes",
        type=float,
        metavar="M",
        help="until a provider that compiles has a first result "
        f"(default: {COMPILE_MINUTES['cpu']:g}, on CUDA {COMPILE_MINUTES['cuda']:g})",
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="begin nothing new after that long; the least important come last"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"of {FILE} (default, for all targets: bench/results/<device>)"
    )
    parser.add_argument("--add", action="store_true", help="keep what the file holds and this run has no row for")
    add_resume(parser)
    parser.add_argument("--list", action="store_true", help="print the targets, and exit")
    parser.add_argument("--quick", action="store_true", help="a few repetitions, as a smoke test")
    options = parser.parse_args(arguments)
    try:
        (options.device,) = names("--device", [options.device], DEVICES)
        chosen = names("--only", options.only, tuple(target.name for target in TARGETS))
        for flag in ("minutes", "compile_minutes"):
            value = getattr(options, flag)
            if value is not None and not value > 0:
                raise ValueError(f"--{flag.replace('_', '-')}: must be more than 0, got {value:g}")
        if options.device == "auto":
            options.device = "cuda" if torch.cuda.is_available() else "cpu"
        if options.device == "cuda" and not torch.cuda.is_available() and not options.list:
            raise ValueError("--device: cuda needs a CUDA device and a torch built for it, got none; use --device cpu")
    except ValueError as error:
        parser.error(str(error))
    options.dtype = DEFAULT_DTYPES[options.device]
    options.filtered = len(chosen) < len(TARGETS) or options.quick or options.compiled
    options.targets = [target for target in TARGETS if target.name in chosen]
    return options


def grouped(targets: Sequence[Target]) -> dict[Workload, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Modes and providers of each workload, the most important first."""
    found: dict[Workload, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for target in sorted((one for one in targets if one.mode), key=lambda one: importance(one.workload)):
        modes, providers = found.get(target.workload, ((), (OURS,)))
        found[target.workload] = (
            tuple(dict.fromkeys((*modes, target.mode))),
            tuple(dict.fromkeys((*providers, *target.against))),
        )
    return found


class Progress:
    """A line for everything that begins, with the seconds since the start."""

    def __init__(self) -> None:
        self.started, self._task = time.perf_counter(), ""

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started

    def task(self, text: str) -> None:
        """What the lines that follow belong to."""
        self._task = text

    def __call__(self, text: str) -> None:
        print(f"{self.seconds:7.0f} s  {self._task}: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, judge, print, write.

    Returns:
        0; 1 if a provider or the device failed; 2 if the records of before can't be read; 130 after Ctrl-C, with what
        was measured written.
    """
    options = parse(arguments)
    console = console_for(sys.stdout)
    if options.list:
        for target in options.targets:
            what, sense = KINDS[target.kind]
            print(
                f"{target.name}  {target.op} {target.case} {target.mode}  {what} ({', '.join(target.against)}) "
                f"{sense} cpu {target.cpu or '-'}, cuda {target.cuda or '-'}"
            )
        return 0
    progress = Progress()
    facts = environment.describe(options.device, "bench.targets")
    path = output_path(options, facts["device"])
    try:
        kept = earlier_records(path) if path is not None and (options.add or options.resume != Resume()) else []
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    run: Run | None = None
    interrupted = False
    try:
        with exact_matmuls():
            progress.task("limits")
            progress("measuring the device")
            run = start(options, facts, progress.started)
            run.saves_time, run.say = False, progress
            for _ in measure(options, run, progress):
                save(path, merged(kept, run.records), options.device)
    except KeyboardInterrupt:
        interrupted = True
    records = run.records if run is not None else []
    failure = run.failure if run is not None else None
    found = merged(kept, records)
    save(path, found, options.device)
    print_table([judge(target, found, options.device) for target in options.targets], console)
    written = [path] if path is not None else []
    print_end(interrupted, run, written, progress.seconds, console)
    if interrupted:
        return 130
    return 1 if failure or any(record.status == "failed" for record in records) else 0


def measure(options: Any, run: Run, progress: Progress) -> Iterator[None]:
    """Pauses after each workload."""
    run.seconds, run.at_least = SECONDS[options.device], AT_LEAST
    run.compile_seconds = 60 * (options.compile_minutes or COMPILE_MINUTES[options.device])
    everyone, workloads = all_providers(), grouped(options.targets)
    for run.task, (workload, (modes, providers)) in enumerate(workloads.items()):
        progress.task(f"{run.task + 1}/{len(workloads)} {workload.op} {workload.name}")
        chosen = options.resume.providers(run.task, [everyone[name] for name in everyone if name in providers])
        run.providers = [one for one in chosen if not (one.compiles and options.no_compile)]
        if not run.providers or (options.compiled and not any(one.compiles for one in chosen)):
            continue
        own_roofline = any(one.kind == "roofline" and one.workload == workload for one in options.targets if one.mode)
        if options.no_compile and len(run.providers) == 1 and not own_roofline:
            progress("not begun: whom it is compared with compiles")
            continue
        reason = run.stopped()
        if reason == OVER:
            progress("not begun: the time is over")
            continue
        measure_workload(run, workload, options.dtype[0], modes)
        progress(reason or "done")
        yield


def output_path(options: Any, device: str) -> Path | None:
    """A run of some targets is no record of the device unless a place is named."""
    folder = options.out
    if folder is None and not options.filtered:
        folder = environment.REPOSITORY / "bench" / "results" / environment.slug(device)
    return folder and folder / FILE


def save(path: Path | None, records: Sequence[Measurement], device: str) -> None:
    """The records, and every target judged by them."""
    if path is not None and records:
        verdicts = [judge(target, records, device).to_dict() for target in TARGETS]
        write_records(path, records, targets=verdicts)


def print_table(verdicts: Sequence[Verdict], console: Any) -> None:
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
