"""How ``python -m bench ops`` shows itself: progress, tables, the list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..measure.roofline import Limits
from ..providers.registry import Provider
from ..records import environment
from ..records.record import Measurement, read_records, write_records
from ..workloads import Workload
from .options import Resume

FURTHEST = 10
OUR_PROVIDERS = ("hia", "textbook", "gemms", "reference")  # and hia-<backend>; without the reference none is checked
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


def output_paths(options: Any, device: str) -> list[Path]:
    """Where records go: a filtered run is no record of the device unless a place is named."""
    folder = options.out
    if folder is None and not options.filtered:
        folder = environment.REPOSITORY / "bench" / "results" / environment.slug(device)
    return [path for path in (folder and folder / "kernels.json", options.json) if path]


def earlier_records(path: Path) -> list[Measurement]:
    """What a file holds that a run will add to; nothing where there is none.

    Raises:
        ValueError: it holds something else.
    """
    try:
        return read_records(path) if path.exists() else []
    except (ValueError, OSError) as error:
        raise ValueError(
            f"--out: {path} must hold the records of an earlier run, got: {error}; move it away, or name another folder"
        ) from error


def merged(kept: Sequence[Measurement], records: Sequence[Measurement]) -> list[Measurement]:
    """What was found now, and of before what wasn't; that something could not run now replaces no number."""
    numbers = {record.key for record in kept if record.status != "unavailable"}
    new = [record for record in records if record.status != "unavailable" or record.key not in numbers]
    replaced = {record.key for record in new}
    return [record for record in kept if record.key not in replaced] + new


class Writer:
    """Keeps a run's files up to date. A folder's file keeps what it held and the run has no row for, until a complete
    run ends; the file of ``--json`` is the run's alone, with what a run that ``--resume`` goes on with had put there.

    Args:
        options: of the command line.
        device: its name.

    Raises:
        ValueError: the folder's file holds something else.
    """

    def __init__(self, options: Any, device: str) -> None:
        self.paths = output_paths(options, device)
        own = options.json if options.resume == Resume() else None
        self._kept = {path: [] if path == own else earlier_records(path) for path in self.paths}

    def __call__(self, records: Sequence[Measurement], *, complete: bool = False) -> None:
        """Everything measured so far, to every path; nothing replaces no record."""
        for path in self.paths if records else []:
            write_records(path, merged([] if complete else self._kept[path], records))


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
    """A table of everything, why the rest is missing, and the rows furthest from their roofline."""
    if limits is not None:
        rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in limits.rates.items())
        console.print(f"limits measured in this run: copy {limits.bandwidth / 1e9:,.1f} GB/s, products {rates}")
    shown = [record for record in records if record.status != "unavailable"]
    if shown:
        console.print(_table("p50 by provider; the roofline is max(bytes / bandwidth, FLOPs / rate)", shown))
    for line in unavailable_lines(records):
        console.print(f"unavailable  {line}", highlight=False, markup=False, soft_wrap=True)
    for line in left_out:
        console.print(f"not measured, out of time: {line}", highlight=False, markup=False, soft_wrap=True)
    far = furthest(records)
    if far:
        console.print(_table("furthest from their roofline: the fastest provider of each workload", far))


def furthest(records: Sequence[Measurement], count: int = FURTHEST) -> list[Measurement]:
    """Of each workload the fastest row; of those the ones with the lowest share of their roofline."""
    best: dict[tuple[str, ...], Measurement] = {}
    for record in records:
        if record.status != "ok" or record.percent_of_roofline is None or record.extra.get("limit"):
            continue
        key = (record.op, record.case, record.mode, record.dtype)
        if key not in best or record.p50_ms < best[key].p50_ms:
            best[key] = record
    return sorted(best.values(), key=lambda record: record.percent_of_roofline)[:count]


def unavailable_lines(records: Sequence[Measurement]) -> list[str]:
    """Provider and reason, each once, with how many rows it concerns."""
    return _counted(record for record in records if record.status == "unavailable")


def _counted(records: Iterable[Measurement]) -> list[str]:
    counts = Counter((record.provider, record.reason or "") for record in records)
    return [f"{provider}: {reason} ({count} rows)" for (provider, reason), count in counts.items()]


def is_ours(record: Measurement) -> bool:
    """Whether a row that failed is this project's failure, not a peer's."""
    return record.provider in OUR_PROVIDERS or record.provider.startswith("hia-")


def print_failures(records: Sequence[Measurement], console: Console) -> None:
    """Who failed and why: ours, for which the run fails, then peers, for which it doesn't."""
    failed = [record for record in records if record.status == "failed"]
    ours = [f"failed  {line}" for line in _counted(record for record in failed if is_ours(record))]
    theirs = [f"a peer failed  {line}" for line in _counted(record for record in failed if not is_ours(record))]
    for line in ours + theirs:
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)


def _table(title: str, records: Sequence[Measurement]) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False)
    for name in ("op", "case", "mode", "dtype", "provider"):
        table.add_column(name, overflow="fold")
    for name in ("p20", "p50 ms", "p80", "roofline", "% roofline", "GFLOP/s", "GB/s", "peak MB"):
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
    share = "" if record.percent_of_roofline is None else f"{record.percent_of_roofline:.0f}"
    roofline = "" if record.roofline_ms is None else _milliseconds(record.roofline_ms)
    peak = "" if record.peak_bytes is None else f"{record.peak_bytes / 1e6:,.1f}"
    times = (_milliseconds(time) for time in (record.p20_ms, record.p50_ms, record.p80_ms))
    rates = (f"{record.flops / seconds / 1e9:,.1f}", f"{record.bytes / seconds / 1e9:,.1f}")
    return (*times, roofline, share, *rates, peak)


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def print_end(interrupted: bool, run: Any, paths: Sequence[Path], seconds: float, console: Console) -> None:
    """How it ended, and where the records went."""
    if interrupted:
        console.print("interrupted: what was measured is kept")
    if run is not None and run.failure is not None:
        line = f"{run.failure}: nothing more can run on it in this process, and the rest was not run; the same command "
        line += f"with --resume {run.resume} goes on"
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    written = ", ".join(map(str, paths)) or "nowhere (not everything was asked for: name a place by --out)"
    console.print(f"{seconds:.0f} s; written: {written}", highlight=False, soft_wrap=True)
