"""The report as Markdown: every table with its command, device and commit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..records.record import Measurement
from ..records.targets import cells
from .data import (
    Change,
    Results,
    Standing,
    beside_limits,
    furthest_from_roofline,
    note_of,
    side_of,
    source_line,
    sources,
    standings,
    total_bytes,
)

Cells = tuple[list[str], list[list[str]]]
TEXT_COLUMNS = {
    "level",
    "op",
    "case",
    "provider",
    "mode",
    "dtype",
    "note",
    "verdict",
    "against",
    "method",
    "host",
    "forms",
    "target",
    "workload",
    "ratio of",
}
VERDICTS = ("met", "MISSED", "not measured", "no target")
GB = 10**9


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, no exponent; "-" for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def table(cells: Cells) -> list[str]:
    """Lines of a Markdown table; numbers to the right."""
    header, rows = cells
    rule = ["---" if name in TEXT_COLUMNS else "---:" for name in header]
    return ["| " + " | ".join(_escaped(line)) + " |" for line in (header, rule, *rows)]


def _escaped(line: Iterable[str]) -> list[str]:
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in line]


def source_lines(records: Iterable[Measurement]) -> list[str]:
    """What every table ends with."""
    return ["", *(f"<sub>`{line.replace('`', '')}`</sub>  " for line in sources(records)), ""]


def standing_cells(found: Sequence[Standing]) -> Cells:
    """Ours against the others."""
    header = [
        "op",
        "mode",
        "dtype",
        "cases",
        "against",
        "others' time / ours (cases)",
        "cases in which another is faster",
    ]
    rows = []
    for entry in found:
        against = sorted(entry.against.items(), key=lambda item: item[1][0])
        names = ", ".join(name for name, _ in against)
        ratios = ", ".join(f"{name} {ratio:.2f} ({count})" for name, (ratio, count) in against)
        slower = f"{len(entry.slower)} of {entry.cases}"
        rows.append([entry.op, entry.mode, entry.dtype, str(entry.cases), names, ratios, slower])
    return header, rows


def change_cells(changes: Sequence[Change]) -> Cells:
    """Regressions and wins in one table, the slowest first."""
    header = ["verdict", "op", "case", "provider", "mode", "dtype", "before ms", "now ms", "now / before", "note"]
    rows = []
    for change in changes:
        if change.verdict == "unchanged":
            continue
        record = change.now
        rows.append(
            [
                change.verdict,
                record.op,
                record.case,
                record.provider,
                record.mode,
                record.dtype,
                number(change.before_ms),
                number(record.p50_ms),
                f"{change.ratio:.2f}",
                "" if change.certain else "within the noise",
            ]
        )
    return header, rows


def kernel_cells(records: Sequence[Measurement]) -> Cells:
    """Every measurement of ops and composites."""
    header = [
        "op",
        "case",
        "provider",
        "mode",
        "dtype",
        "p20 ms",
        "p50 ms",
        "p80 ms",
        "% of roofline",
        "peak MB",
        "note",
    ]
    rows = []
    for record in records:
        peak = None if record.peak_bytes is None else record.peak_bytes / 1e6
        note = note_of(record)
        rows.append(
            [
                record.op,
                record.case,
                record.provider,
                record.mode,
                record.dtype,
                number(record.p20_ms),
                number(record.p50_ms),
                number(record.p80_ms),
                number(record.percent_of_roofline),
                number(peak),
                f"**{record.status}**: {note}" if record.status == "failed" else note,
            ]
        )
    return header, rows


def end_to_end_cells(records: Sequence[Measurement]) -> Cells:
    """Whole models, the time beside ours in every row."""
    header = ["op", "case", "provider", "dtype", "p50 ms", "ours = 1", "tokens/s", "peak GB", "note"]
    ours = {(r.op, r.case, r.dtype): r.p50_ms for r in records if r.provider == "hia" and r.status == "ok"}
    rows = []
    for record in records:
        base = ours.get((record.op, record.case, record.dtype))
        total = total_bytes(record)
        rate = record.extra.get("tokens_per_s")
        rows.append(
            [
                record.op,
                record.case,
                record.provider,
                record.dtype,
                number(record.p50_ms),
                "-" if not base or not record.p50_ms else f"{record.p50_ms / base:.2f}",
                number(rate),
                number(None if total is None else total / GB),
                record.reason or ("noisy" if record.noisy else ""),
            ]
        )
    return header, rows


def roofline_cells(records: Sequence[Measurement]) -> Cells:
    """The rows furthest from their roofline."""
    header = ["op", "case", "mode", "dtype", "p50 ms", "roofline ms", "% of roofline"]
    return header, [
        [r.op, r.case, r.mode, r.dtype, number(r.p50_ms), number(r.roofline_ms), number(r.percent_of_roofline)]
        for r in furthest_from_roofline(records)
    ]


def limit_cells(records: Sequence[Measurement]) -> Cells:
    """Ours beside the bare products of the forms its plan takes, and what the forms save."""
    header = ["op", "case", "mode", "dtype", "forms", "GFLOPs", "textbook's", "ours ms", "limit ms", "ours / limit"]
    rows = []
    for ours, limit in beside_limits(records):
        counts = (ours.extra.get(name) for name in ("plan_flops", "textbook_flops"))
        ratio = (ours.p50_ms or 0.0) / (limit.p50_ms or 1.0)
        rows.append(
            [
                ours.op,
                ours.case,
                ours.mode,
                ours.dtype,
                str(ours.extra.get("forms", "-")),
                *(number(count and count / 1e9) for count in counts),
                number(ours.p50_ms),
                number(limit.p50_ms),
                f"{ratio:.2f}",
            ]
        )
    return header, rows


def target_lines(results: Results) -> list[str]:
    """What the project is held to: ratio, measured, verdict, note, and how many are met."""
    counts = {word: sum(one["verdict"] == word for one in results.targets) for word in VERDICTS}
    tally = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return [f"{tally}.", "", *table(cells(results.targets)), *source_lines(results.target_records)]


def targets_page(results: Results) -> str:
    """The targets alone, on one device."""
    lines = [f"# Targets on {results.device}", "", *target_lines(results)]
    return "\n".join(lines).rstrip() + "\n"


def table3_cells(record: dict[str, Any]) -> Cells:
    """The predicted rows beside the paper's figures."""
    header = ["px", "method", "attention", "TFLOPs", "paper", "GB", "paper GB", "fits"]
    rows = []
    for row in record.get("rows", []):
        flops, memory = row.get("flops"), row.get("memory_bytes")
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
                {True: "yes", False: "x", None: "-"}[row.get("fits")],
            ]
        )
    return header, rows


def change_lines(changes: Sequence[Change]) -> list[str]:
    """The table of what moved, and how much did not; nothing where there was nothing to compare with."""
    if not changes:
        return []
    cells = change_cells(changes)
    unchanged = sum(change.verdict == "unchanged" for change in changes)
    lines = [*(table(cells) if cells[1] else ["Nothing moved by more than 5 %."]), ""]
    lines.append(f"{unchanged} of {len(changes)} measurements that both records have are unchanged.")
    return lines + source_lines(change.now for change in changes)


def page(results: Results, pictures: Sequence[str]) -> str:
    """One device's page."""
    kernels = [record for record in results.records if record.level != "end_to_end"]
    whole = [record for record in results.records if record.level == "end_to_end"]
    lines = [f"# {results.device}", ""]
    lines += [f"![{name.rsplit('.', 1)[0].replace('-', ' ')}]({name})" for name in pictures] + [""]
    if results.targets:
        lines += ["## Targets", "", *target_lines(results)]
    lines += [
        "## Ours beside the others",
        "",
        "Geometric means over the cases that both have; above 1 ours is faster.",
        "",
    ]
    lines += [*table(standing_cells(standings(results.records))), *source_lines(results.records)]
    lines += ["## Changes", "", f"Against {results.previous}.", "", *change_lines(results.changes)]
    if kernels:
        if beside_limits(kernels):
            lines += [
                "## Beside the bare matrix products",
                "",
                "Of the forms our plan takes; of adapter_layer with our encoder's run before them.",
                "",
                *table(limit_cells(kernels)),
                *source_lines(kernels),
            ]
        if furthest_from_roofline(kernels):
            lines += ["## Furthest from the roofline", "", *table(roofline_cells(kernels)), *source_lines(kernels)]
        lines += ["## Ops and composites", "", *table(kernel_cells(kernels)), *source_lines(kernels)]
    if whole:
        whole = sorted(whole, key=lambda record: (record.op, record.extra.get("batch", 1), side_of(record) or 0))
        lines += ["## End to end", "", *table(end_to_end_cells(whole)), *source_lines(whole)]
    if results.table3 is not None:
        lines += ["## Table 3", "", *table(table3_cells(results.table3)), ""]
        lines += [f"<sub>`{source_line(results.table3.get('environment', {}))}`</sub>", ""]
    return "\n".join(lines).rstrip() + "\n"
