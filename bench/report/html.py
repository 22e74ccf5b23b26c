"""One self-contained HTML page: data, style and script inline, nothing fetched from anywhere."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..records.record import Measurement
from ..records.targets import cells
from .data import Results, family_of, note_of, side_of, source_line, sources, standings, total_bytes
from .plots import ceilings

ASSETS = Path(__file__).resolve().parent / "assets"


def row_of(record: Measurement) -> dict[str, Any]:
    """A measurement as the page has it."""
    return {
        "level": record.level,
        "op": record.op,
        "case": record.case,
        "family": family_of(record),
        "side": side_of(record),
        "provider": record.provider,
        "mode": record.mode,
        "dtype": record.dtype,
        "status": record.status,
        "reason": note_of(record) or None,
        "p20": record.p20_ms,
        "p50": record.p50_ms,
        "p80": record.p80_ms,
        "noisy": record.noisy,
        "repeats": record.repeats,
        "flops": record.flops,
        "bytes": record.bytes,
        "floor": record.roofline_ms,
        "pof": record.percent_of_roofline,
        "peak": total_bytes(record),
        "tps": record.extra.get("tokens_per_s"),
        "source": source_line(record.environment),
    }


def device_of(results: Results) -> dict[str, Any]:
    """A device's part of the page's data."""
    limits = [
        {"bandwidth": bandwidth, "rate": rate, "dtype": dtype}
        for bandwidth, rate, dtype in ceilings([record for record in results.records if record.status == "ok"])
    ]
    changes = [
        {
            "verdict": change.verdict,
            "before": change.before_ms,
            "now": change.now.p50_ms,
            "ratio": change.ratio,
            "note": "" if change.certain or change.verdict == "unchanged" else "within the noise",
            **{name: getattr(change.now, name) for name in ("op", "case", "provider", "mode", "dtype")},
            "source": source_line(change.now.environment),
        }
        for change in results.changes
    ]
    return {
        "slug": results.slug,
        "name": results.device,
        "rows": [row_of(record) for record in results.records],
        "standings": [
            {
                "op": one.op,
                "mode": one.mode,
                "dtype": one.dtype,
                "cases": one.cases,
                "against": one.against,
                "slower": one.slower,
            }
            for one in standings(results.records)
        ],
        "changes": changes,
        "previous": results.previous,
        "ceilings": limits,
        "table3": _table3(results.table3),
        "targets": _targets(results),
    }


def _targets(results: Results) -> dict[str, Any]:
    """The table of ``bench.targets`` by its own headings, and the bare ratio to sort by."""
    header, rows = cells(results.targets)
    named = [dict(zip(header, row, strict=True)) for row in rows]
    for row, target in zip(named, results.targets, strict=True):
        row["ratio"] = target["ratio"]
    return {"rows": named, "sources": sources(results.target_records)}


def _table3(record: dict[str, Any] | None) -> dict[str, Any] | None:
    if record is None:
        return None
    names = (
        "resolution",
        "method",
        "attention",
        "flops",
        "memory_bytes",
        "fits",
        "paper_flops_t",
        "paper_memory_gb",
        "paper_out_of_memory",
        "tokens",
    )
    rows = [{name: row.get(name) for name in names} for row in record.get("rows", [])]
    dtype = record.get("protocol", {}).get("dtype", "")
    return {"rows": rows, "dtype": dtype, "source": source_line(record.get("environment", {}))}


def render(devices: Sequence[Results]) -> str:
    """The page."""
    made = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    data = {"made": made, "devices": [device_of(results) for results in devices]}
    # "<" would let a string in a record end the script element
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (ASSETS / "report.html").read_text(encoding="utf-8")
    parts = {
        "/*STYLE*/": (ASSETS / "report.css").read_text(encoding="utf-8"),
        "/*SCRIPT*/": (ASSETS / "report.js").read_text(encoding="utf-8"),
        "/*DATA*/": text,
    }
    for mark, part in parts.items():
        before, _, after = page.partition(mark)
        page = before + part + after
    return page
