"""The report section by section, for both of its renderers."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..plotting import unavailable
from ..records.environment import commit_of
from ..records.record import Measurement
from ..records.targets import cells
from ..table3.plot import figure_of
from . import plots
from .data import Change, Results, command_of, side_of, source_line, sources, total_bytes
from .speedup import OURS, Speedup, beside_limits, furthest_from_roofline, speedups, verdict_of

LEVELS = {"end_to_end": "model", "composite": "part", "op": "op"}
MODES = {"forward": "forward", "backward": "backward", "both": "forward + backward", "dispatch": "call overhead"}
TONES = {
    **dict.fromkeys(("faster", "met"), "good"),
    **dict.fromkeys(("slower", "MISSED", "failed"), "bad"),
    **dict.fromkeys(("noisy", "within the noise"), "warn"),
}
NOT_MEASURED = "not measured"
PEERS, OWN = "peers' time / ours (cases)", "our other backends' time / ours"
WRAPPED = frozenset(("command", "workload", "note", "reason", PEERS, OWN))  # columns of long texts
GB = 10**9


@dataclass(frozen=True)
class Cell:
    """A place of a table.

    Attributes:
        text: of the cell.
        tone: "good", "bad", "warn", "best" (the fastest of its row), or none.
        note: smaller, below it.
    """

    text: str
    tone: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.note})" if self.note else self.text


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: names of the columns.
        rows: of texts and cells.
        text: columns that hold text; the others hold numbers.
        title: above it.
        folded: only the title is shown until the reader opens it.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    text: frozenset[str] = frozenset()
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Chart:
    """A picture.

    Attributes:
        name: of its file.
        title: above it.
        says: what it shows, for those who don't see it.
        draw: makes the figure, by matplotlib.
    """

    name: str
    title: str
    says: str
    draw: Callable[[], Any]


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        key: for links.
        title: its heading.
        text: what a reader must know to read it.
        parts: tables and charts.
        sources: the runs behind it, a line each.
    """

    key: str
    title: str
    text: str
    parts: Sequence[Table | Chart]
    sources: Sequence[str]


def report(results: Results) -> list[Section]:
    """Make all sections of a device; one that has nothing to show is left out."""
    made = [
        verdicts(results),
        runs(results),
        charts(results),
        targets(results),
        whole_models(results),
        table3(results),
        limits(results),
        changes(results),
        measurements(results),
        missing(results),
    ]
    return [section for section in made if section is not None]


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with so many significant digits and no exponent; "-" for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def toned(word: str) -> Cell:
    """Colour a verdict."""
    return Cell(word, TONES.get(word, ""))


def verdicts(results: Results) -> Section | None:
    """Judge every op: ours against the fastest peer."""
    found = speedups(results.measured)
    if not found:
        return None
    modes = [mode for mode in MODES if any(one.mode == mode for one in found)]
    dtypes = sorted({one.dtype for one in found})
    by_row: dict[tuple[str, str, str], dict[str, Speedup]] = {}
    for one in sorted(found, key=lambda one: list(LEVELS).index(one.level)):
        by_row.setdefault((one.level, one.op, one.dtype), {})[one.mode] = one
    rows = [
        [op, LEVELS[level], *([dtype] if len(dtypes) > 1 else []), *(_verdict_cell(own.get(mode)) for mode in modes)]
        for (level, op, dtype), own in by_row.items()
    ]
    header = ["what", "level", *(["dtype"] if len(dtypes) > 1 else []), *(MODES[mode] for mode in modes)]
    text = (
        "Each cell is the time of the fastest peer over ours: above 1, ours is faster; within 5 % the two are even. It "
        "is the geometric mean over the cases that both ran, and the fastest peer is chosen for each case. Below it "
        "stand that peer and, where it is known, the share of the roofline that ours reaches: 100 % is the limit that "
        f"this device's memory or arithmetic sets. {_tally(found, modes)}"
    )
    main = Table(header, rows, frozenset(header), f"Ours against the fastest peer, {', '.join(dtypes)}")
    return Section("verdicts", "Verdicts", text, [main, _every_peer(found)], sources(results.measured))


def _verdict_cell(one: Speedup | None) -> Cell:
    if one is None:
        return Cell("")
    peers = ", ".join(one.fastest[:2]) + (", ..." if len(one.fastest) > 2 else "")
    share = "" if one.percent_of_roofline is None else f"; {one.percent_of_roofline:.0f} % of roofline"
    return Cell(f"{one.ratio:.2f} {one.verdict}", TONES.get(one.verdict, ""), f"{peers}{share}")


def _tally(found: Sequence[Speedup], modes: Sequence[str]) -> str:
    lines = []
    for mode in modes:
        counts = Counter(one.verdict for one in found if one.mode == mode)
        words = ", ".join(f"{counts[word]} {word}" for word in ("faster", "even", "slower") if counts[word])
        lines.append(f"{MODES[mode]} {words}")
    return f"In counts: {'; '.join(lines)}."


def _every_peer(found: Sequence[Speedup]) -> Table:
    rows = [
        [
            *(one.op, MODES[one.mode], one.dtype, str(one.cases)),
            *(_ratios(one.against), _ratios(one.beside)),
            f"{len(one.slower)} of {one.cases}",
        ]
        for one in found
    ]
    header = ["op", "mode", "dtype", "cases", PEERS, OWN, "cases where a peer is faster"]
    columns = frozenset(("op", "mode", "dtype", PEERS, OWN))
    return Table(header, rows, columns, "Every provider against ours", folded=True)


def _ratios(against: dict[str, tuple[float, int]]) -> str:
    found = sorted(against.items(), key=lambda item: item[1][0])
    return ", ".join(f"{name} {ratio:.2f} ({count})" for name, (ratio, count) in found)


def charts(results: Results) -> Section | None:
    """Draw what the records allow, where matplotlib is."""
    if unavailable():
        return None
    records = results.measured
    by_side = "against the side of the images, one line a provider."
    made = {
        ("speedup", "Speedup over every peer", "A row an op and a mark a peer; right of 1 ours is faster."): (
            plots.speedup_chart(speedups(records))
        ),
        ("time", "Time by image size", f"Time {by_side}"): plots.curves_chart(records, lambda r: r.p50_ms, "ms"),
        ("memory", "Peak memory by image size", f"Peak memory {by_side}"): (
            plots.curves_chart(records, lambda r: (total_bytes(r) or 0) / 1e6 or None, "MB")
        ),
        ("roofline", "Roofline", "Rate against intensity, of ours and of the fastest peer of each case."): (
            plots.roofline_chart(records)
        ),
    }
    drawn = [Chart(*words, draw) for words, draw in made.items() if draw is not None]
    text = (
        "Axes are logarithmic. The roofline's dashed line is the bandwidth and the matrix rate that were measured on "
        "this device in the same runs. FLOPs are those of the mathematics as it is written down: a mark above the line "
        "does the same with fewer."
    )
    return Section("charts", "Charts", text, drawn, sources(records)) if drawn else None


def targets(results: Results) -> Section | None:
    """Show the ratios that the project is held to; those that were not measured are folded."""
    if not results.targets:
        return None
    header, rows = cells(results.targets)
    column = header.index("verdict")
    words = [row[column] for row in rows]
    counts = {word: words.count(word) for word in ("met", "MISSED", NOT_MEASURED, "no target")}
    toned_rows = [[*row[:column], toned(row[column]), *row[column + 1 :]] for row in rows]
    known = [row for row, word in zip(toned_rows, words, strict=True) if word != NOT_MEASURED]
    others = [row for row, word in zip(toned_rows, words, strict=True) if word == NOT_MEASURED]
    columns = frozenset(header) - {"must be", "measured"}
    parts = [Table(header, known, columns, "Targets")] if known else []
    if others:
        parts.append(Table(header, others, columns, f"{len(others)} targets not measured on this device", folded=True))
    tally = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    text = (
        "The ratios that the project is held to, each of two measurements of one workload that took turns in one run. "
        f"{tally}."
    )
    return Section("targets", "Targets", text, parts, sources(results.target_records))


def whole_models(results: Results) -> Section | None:
    """Show whole models, the time beside ours in every row."""
    records = [record for record in results.records if record.level == "end_to_end" and record.status == "ok"]
    if not records:
        return None
    records = sorted(records, key=lambda record: (record.op, record.extra.get("batch", 1), side_of(record) or 0))
    ours = {(r.op, r.case, r.dtype): r.p50_ms for r in records if r.provider == OURS}
    header = ["quantity", "case", "provider", "dtype", "p50 ms", "time / ours", "tokens/s", "peak GB", "note"]
    rows: list[list[str | Cell]] = []
    for record in records:
        base, total = ours.get((record.op, record.case, record.dtype)), total_bytes(record)
        ratio = record.p50_ms / base if base and record.p50_ms else None
        rows.append(
            [
                record.op,
                record.case,
                record.provider,
                record.dtype,
                number(record.p50_ms),
                "-" if ratio is None else Cell(f"{ratio:.2f}", TONES.get(verdict_of(ratio), "")),
                number(record.extra.get("tokens_per_s")),
                number(None if total is None else total / GB),
                toned("noisy") if record.noisy else "",
            ]
        )
    hosts = ", ".join(dict.fromkeys(str(record.extra.get("host", "a host")) for record in records))
    text = (
        f"One question to a whole model ({hosts}). plain shrinks the images to 336 px and reads less than the others."
    )
    table = Table(header, rows, frozenset(("quantity", "case", "provider", "dtype", "note")), "Whole models")
    return Section("end-to-end", "End to end", text, [table], sources(records))


def table3(results: Results) -> Section | None:
    """Show the paper's Table 3 beside ours."""
    record = results.table3
    if record is None or not record.get("rows"):
        return None
    header = ["px", "method", "attention", "TFLOPs", "paper", "GB", "paper GB", "fits"]
    rows = []
    for row in record["rows"]:
        flops, memory, fits = row.get("flops"), row.get("memory_bytes"), row.get("fits")
        paper_memory = "x" if row.get("paper_out_of_memory") else number(row.get("paper_memory_gb"))
        rows.append(
            [
                str(row["resolution"]),
                row["method"],
                row["attention"],
                number(flops and flops / 1e12),
                number(row.get("paper_flops_t")),
                number(memory and memory / GB),
                paper_memory,
                {True: "yes", False: Cell("no", "bad"), None: "-"}[fits],
            ]
        )
    parts: list[Table | Chart] = []
    if not unavailable():
        says = "FLOPs and peak memory of a prefill against the side of the images, one line a method."
        parts.append(Chart("table3", "Table 3", says, lambda: figure_of(record)))
    parts.append(Table(header, rows, frozenset(("method", "attention", "fits")), "Table 3, predicted", folded=True))
    text = (
        "The paper's Table 3, recomputed for the 13B host. FLOPs are counted and memory is predicted under fake "
        "tensors; nothing of it was run. x is what the paper prints for out of memory."
    )
    return Section("table3", "Table 3", text, parts, [source_line(record.get("environment", {}))])


def limits(results: Results) -> Section | None:
    """Show how far ours is from what the device could do."""
    records = results.measured
    parts = []
    header = ["op", "case", "mode", "dtype", "forms", "GFLOPs", "textbook's", "ours ms", "limit ms", "ours / limit"]
    rows = []
    for ours, limit in beside_limits(records):
        counts = (ours.extra.get(name) for name in ("plan_flops", "textbook_flops"))
        rows.append(
            [
                *(ours.op, ours.case, ours.mode, ours.dtype, str(ours.extra.get("forms", "-"))),
                *(number(count and count / 1e9) for count in counts),
                *(number(ours.p50_ms), number(limit.p50_ms)),
                f"{(ours.p50_ms or 0.0) / (limit.p50_ms or 1.0):.2f}",
            ]
        )
    columns = frozenset(("op", "case", "mode", "dtype", "forms"))
    if rows:
        parts.append(Table(header, rows, columns, "Beside the bare matrix products"))
    furthest = furthest_from_roofline(records)
    if furthest:
        header = ["op", "case", "mode", "dtype", "p50 ms", "roofline ms", "% of roofline"]
        rows = [
            [r.op, r.case, r.mode, r.dtype, number(r.p50_ms), number(r.roofline_ms), number(r.percent_of_roofline)]
            for r in furthest
        ]
        parts.append(Table(header, rows, columns, "The ten rows of ours that are furthest from the roofline"))
    words = dict.fromkeys(str(limit.extra["limit"]) for _, limit in beside_limits(records))
    text = "What is left to win: the time over that of the bare products, and over the roofline."
    text += f" The limit is {', '.join(words)}." if words else ""
    return Section("limits", "Limits", text, parts, sources(records)) if parts else None


def changes(results: Results) -> Section:
    """Show how ours moved, regressions and wins in one table, the slowest first; and the others in a sentence."""
    ours, others = ([c for c in results.changes if (c.now.provider == OURS) is own] for own in (True, False))
    moved = [change for change in ours if change.verdict != "unchanged"]
    text = f"Against {results.previous}. A median that moved by less than 5 % counts as unchanged."
    if ours:
        text += f" {len(ours) - len(moved)} of {len(ours)} measurements of ours that both records have are unchanged."
    if others:
        drift = statistics.median(change.ratio for change in others)
        text += f" Over the {len(others)} of other providers the median of now / before is {drift:.2f}."
    header = ["verdict", "now / before", "note", "before ms", "now ms", "op", "case", "mode", "dtype"]
    columns = frozenset(("verdict", "note", "op", "case", "mode", "dtype"))
    title = f"{len(moved)} measurements of ours that moved, regressions and wins"
    parts = [Table(header, _change_rows(moved), columns, title, folded=True)] if moved else []
    return Section("changes", "Changes", text, parts, sources(change.now for change in results.changes))


def _change_rows(moved: Sequence[Change]) -> list[list[str | Cell]]:
    return [
        [
            toned(change.verdict),
            f"{change.ratio:.2f}",
            "" if change.certain else toned("within the noise"),
            number(change.before_ms),
            number(change.now.p50_ms),
            *(change.now.op, change.now.case, change.now.mode, change.now.dtype),
        ]
        for change in moved
    ]


def measurements(results: Results) -> Section | None:
    """Show every median, a table an op: cases down, providers across."""
    records = [r for r in results.measured if r.status == "ok" and r.level != "end_to_end"]
    if not records:
        return None
    tables = [_op_table(op, [r for r in records if r.op == op]) for op in dict.fromkeys(r.op for r in records)]
    text = (
        "Medians in milliseconds, and the peak memory of the call in MB below or in brackets. The fastest of a row is "
        "marked. ~ stands behind a time whose two halves differ by more than 15 %. The records in bench/results have "
        "percentiles, FLOPs, bytes and the backend that served."
    )
    return Section("measurements", "All measurements", text, tables, sources(records))


def _op_table(op: str, records: Sequence[Measurement]) -> Table:
    providers = sorted(dict.fromkeys(r.provider for r in records), key=lambda name: (name != OURS, name))
    by_row: dict[tuple[str, str, str], dict[str, Measurement]] = {}
    for record in records:
        by_row.setdefault((record.case, record.mode, record.dtype), {})[record.provider] = record
    rows = []
    for (case, mode, dtype), found in by_row.items():
        ours = found.get(OURS)
        share = None if ours is None else ours.percent_of_roofline
        best = min((r for r in found.values() if not r.extra.get("limit")), key=lambda r: r.p50_ms or 0.0)
        times = [_time_cell(found.get(name), found.get(name) is best) for name in providers]
        rows.append([case, mode, dtype, *times, number(share)])
    header = ["case", "mode", "dtype", *providers, "ours, % of roofline"]
    return Table(header, rows, frozenset(("case", "mode", "dtype")), f"{op}: {len(records)} medians", folded=True)


def _time_cell(record: Measurement | None, is_best: bool) -> str | Cell:
    if record is None:
        return ""
    text = number(record.p50_ms) + ("~" if record.noisy else "")
    note = "" if record.peak_bytes is None else f"{number(record.peak_bytes / 1e6, 2)}"
    return Cell(text, "best" if is_best else "", note)


def missing(results: Results) -> Section | None:
    """Count what was not measured, by provider and reason; failures are not folded."""
    rows = [r for r in results.every if r.status != "ok"]
    if not rows:
        return None
    wrong = [r for r in rows if r.status == "failed"]
    failed = [[r.op, r.case, r.mode, r.dtype, r.provider, toned("failed"), r.reason or ""] for r in wrong]
    parts = []
    if failed:
        header = ["op", "case", "mode", "dtype", "provider", "status", "reason"]
        parts.append(Table(header, failed, frozenset(header), f"{len(failed)} measurements failed"))
    left = Counter((r.provider, r.reason or "") for r in rows if r.status == "unavailable")
    if left:
        body = [[name, str(count), reason] for (name, reason), count in sorted(left.items())]
        title = f"{sum(left.values())} measurements that could not be made here, by reason"
        header = ["provider", "rows", "reason"]
        parts.append(Table(header, body, frozenset(("provider", "reason")), title, folded=True))
    text = "A measurement fails where a provider raises or its result misses the tolerance: what is wrong is not timed."
    return Section("missing", "Not measured", text, parts, sources(rows))


def runs(results: Results) -> Section:
    """List what was measured where, by which command, at which commit."""
    counts = Counter(_run_of(record.environment) for record in results.every)
    if results.table3 is not None:
        counts[_run_of(results.table3.get("environment", {}))] += len(results.table3.get("rows", []))
    header = ["command", "device", "threads", "torch", "commit", "date", "rows"]
    rows = [[*run, str(count)] for run, count in sorted(counts.items(), key=lambda item: item[0][-1], reverse=True)]
    table = Table(header, rows, frozenset(header) - {"threads", "rows"}, "Runs")
    text = "A row is one run: its command, the machine it ran on, and the commit of the code."
    return Section("runs", "What was measured where", text, [table], [])


def _run_of(environment: dict[str, Any]) -> tuple[str, ...]:
    versions = environment.get("versions") or {}
    return (
        command_of(environment),
        str(environment.get("device", "unknown")),
        str(environment.get("threads", "?")),
        str(versions.get("torch", "?")),
        commit_of(environment),
        str(environment.get("date", ""))[:10],
    )
