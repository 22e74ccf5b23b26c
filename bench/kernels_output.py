"""How ``python -m bench.kernels`` shows itself: progress, tables, the list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .cases import Workload
from .limits import Limits
from .measurement import Measurement
from .providers import Provider

FURTHEST = 10
PLAIN_WIDTH = 160


def console_for(stream: TextIO) -> Console:
    """Wide enough for whole rows where no terminal says how wide it is."""
    console = Console(file=stream)
    return console if console.is_terminal else Console(file=stream, width=PLAIN_WIDTH)


class Steps:
    """A progress bar with the time left; silent where there is no terminal."""

    def __init__(self, console: Console, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting", total=total)

    @contextmanager
    def shown(self) -> Iterator[Steps]:
        """Show the bar inside the block."""
        with self._bar:
            yield self

    def now(self, what: str) -> None:
        """Say what is being done."""
        self._bar.update(self._task, description=what)

    def done(self) -> None:
        """One step more."""
        self._bar.advance(self._task)


def print_list(
    plan: Sequence[tuple[Workload, tuple[str, ...]]], providers: Sequence[Provider], options: Any, console: Console
) -> None:
    """What would be measured, and who is asked."""
    for workload, modes in plan:
        who = [provider.name for provider in providers if provider.serves(workload)]
        line = f"{workload.op}  {workload.name}  {','.join(options.dtype)}  {','.join(modes)}  {' '.join(who)}"
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"{len(plan)} workloads on {options.device}", highlight=False)


def print_report(
    records: Sequence[Measurement], limits: Limits | None, left_out: Sequence[str], console: Console
) -> None:
    """A table of everything, why the rest is missing, and the rows furthest from their floor."""
    if limits is not None:
        rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in limits.rates.items())
        console.print(f"limits measured in this run: copy {limits.bandwidth / 1e9:,.1f} GB/s, products {rates}")
    shown = [record for record in records if record.status != "unavailable"]
    if shown:
        console.print(_table("p50 by provider; the floor is max(bytes / bandwidth, FLOPs / rate)", shown))
    for line in unavailable_lines(records):
        console.print(f"unavailable  {line}", highlight=False, markup=False, soft_wrap=True)
    for line in left_out:
        console.print(f"not measured, out of time: {line}", highlight=False, markup=False, soft_wrap=True)
    far = furthest(records)
    if far:
        console.print(_table("furthest from their floor: the fastest provider of each workload", far))


def furthest(records: Sequence[Measurement], count: int = FURTHEST) -> list[Measurement]:
    """Of each workload the fastest row; of those the ones with the lowest share of their floor."""
    best: dict[tuple[str, ...], Measurement] = {}
    for record in records:
        if record.status != "ok" or record.percent_of_floor is None or record.extra.get("limit"):
            continue
        key = (record.op, record.case, record.mode, record.dtype)
        if key not in best or record.p50_ms < best[key].p50_ms:
            best[key] = record
    return sorted(best.values(), key=lambda record: record.percent_of_floor)[:count]


def unavailable_lines(records: Sequence[Measurement]) -> list[str]:
    """Provider and reason, each once, with how many rows it concerns."""
    counts: dict[tuple[str, str], int] = {}
    for record in records:
        if record.status == "unavailable":
            key = (record.provider, record.reason or "")
            counts[key] = counts.get(key, 0) + 1
    return [f"{provider}: {reason} ({count} rows)" for (provider, reason), count in counts.items()]


def _table(title: str, records: Sequence[Measurement]) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False)
    for name in ("op", "case", "mode", "dtype", "provider"):
        table.add_column(name, overflow="fold")
    for name in ("p20", "p50 ms", "p80", "floor", "% floor", "GFLOP/s", "GB/s", "peak MB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for record in records:
        where = (record.op, record.case, record.mode, record.dtype, record.provider)
        if record.status == "failed":
            table.add_row(*where, *[""] * 8, f"FAILED {_escaped(record.reason)}", style="red")
        else:
            table.add_row(*where, *_numbers(record), _note(record))
    return table


def _note(record: Measurement) -> str:
    limit = record.extra.get("limit")
    return ", ".join(filter(None, (f"limit: {limit}" if limit else "", "noisy" if record.noisy else "")))


def _escaped(text: str | None) -> str:
    return (text or "").replace("[", "\\[")  # Rich would take it for markup


def _numbers(record: Measurement) -> tuple[str, ...]:
    seconds = record.p50_ms / 1e3
    share = "" if record.percent_of_floor is None else f"{record.percent_of_floor:.0f}"
    floor = "" if record.floor_ms is None else _milliseconds(record.floor_ms)
    peak = "" if record.peak_bytes is None else f"{record.peak_bytes / 1e6:,.1f}"
    times = (_milliseconds(time) for time in (record.p20_ms, record.p50_ms, record.p80_ms))
    rates = (f"{record.flops / seconds / 1e9:,.1f}", f"{record.bytes / seconds / 1e9:,.1f}")
    return (*times, floor, share, *rates, peak)


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def print_interrupted(interrupted: bool, paths: Sequence[Path], seconds: float, console: Console) -> None:
    """Where it went."""
    if interrupted:
        console.print("interrupted: what was measured is kept")
    written = ", ".join(map(str, paths)) or "nowhere (a filtered run: give --out or --json)"
    console.print(f"{seconds:.0f} s; written: {written}", highlight=False, soft_wrap=True)
