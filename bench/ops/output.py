"""The list, the tables and the end that ``python -m bench ops`` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..measure.roofline import Limits
from ..records.files import shown
from ..records.record import Measurement
from .collect import is_ours
from .plan import Plan

FURTHEST = 10


def print_list(plan: Plan, console: Console) -> None:
    """Print what would be measured, and who is asked."""
    for workload, modes in plan.steps:
        who = [provider.name for provider in plan.providers if provider.serves(workload)]
        line = f"{workload.op}  {workload.name}  {','.join(plan.dtypes)}  {','.join(modes)}  {' '.join(who)}"
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"{len(plan.steps)} workloads on {plan.device}", highlight=False)


def print_report(
    records: Sequence[Measurement], limits: Limits | None, left_out: Sequence[str], console: Console
) -> None:
    """Print a table of everything, why the rest is missing, and the rows furthest from their roofline."""
    if limits is not None:
        rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in limits.rates.items())
        console.print(f"limits measured in this run: copy {limits.bandwidth / 1e9:,.1f} GB/s, products {rates}")
    rows = [record for record in records if record.status != "unavailable"]
    if rows:
        console.print(_table("p50 by provider; the roofline is max(bytes / bandwidth, FLOPs / rate)", rows))
    for line in unavailable_lines(records):
        console.print(f"unavailable  {line}", highlight=False, markup=False, soft_wrap=True)
    for line in left_out:
        console.print(f"not measured, out of time: {line}", highlight=False, markup=False, soft_wrap=True)
    far = furthest(records)
    if far:
        console.print(_table("furthest from their roofline: the fastest provider of each workload", far))


def furthest(records: Sequence[Measurement], count: int = FURTHEST) -> list[Measurement]:
    """Return of each workload the fastest row, and of those the ones with the lowest share of their roofline."""
    best: dict[tuple[str, ...], Measurement] = {}
    for record in records:
        if record.status != "ok" or record.percent_of_roofline is None or record.extra.get("limit"):
            continue
        key = (record.op, record.case, record.mode, record.dtype)
        if key not in best or record.p50_ms < best[key].p50_ms:
            best[key] = record
    return sorted(best.values(), key=lambda record: record.percent_of_roofline)[:count]


def unavailable_lines(records: Sequence[Measurement]) -> list[str]:
    """List providers and reasons, each once, with how many rows it concerns."""
    return _counted(record for record in records if record.status == "unavailable")


def _counted(records: Iterable[Measurement]) -> list[str]:
    counts = Counter((record.provider, record.reason or "") for record in records)
    return [f"{provider}: {reason} ({count} rows)" for (provider, reason), count in counts.items()]


def print_failures(records: Sequence[Measurement], console: Console) -> None:
    """Print who failed and why: ours, for which the run fails, then peers, for which it doesn't."""
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


def print_end(
    interrupted: bool, failures: Sequence[str], paths: Sequence[Path], seconds: float, console: Console
) -> None:
    """Print how the run ended, and where the records went."""
    if interrupted:
        console.print("interrupted: what was measured is kept")
    for failure in failures:
        line = f"{failure}: the rest went on without it"
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    written = ", ".join(map(shown, paths)) or "nothing"
    console.print(f"{seconds:.0f} s; written: {written}", highlight=False, soft_wrap=True)
