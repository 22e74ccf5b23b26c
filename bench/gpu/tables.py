"""The tables at the end of a run on a GPU: steps, verdicts on the targets, the rows furthest from their roofline."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..records import resume
from ..records.files import read_json
from .steps import Done

if TYPE_CHECKING:
    from ..records.record import Measurement

FURTHEST = 10


Scope = datetime.datetime | dict[str, Any] | None  # of records: made since then, by this commit on this device, all


def records_of(path: Path, scope: Scope) -> list[Measurement]:
    """Read a file's records within a scope; none where there is no file.

    Raises:
        ValueError: it holds something else.
        OSError: unreadable.
    """
    from ..records.record import read_records

    found = read_records(path) if path.exists() else []
    if scope is None:
        return found
    if isinstance(scope, dict):
        return [record for record in found if resume.identity(record.environment) == scope]
    dates = [datetime.datetime.fromisoformat(record.environment["date"]) for record in found]
    return [record for record, date in zip(found, dates, strict=True) if date >= scope.replace(microsecond=0)]


def furthest_table(out: Path, scope: Scope = None) -> list[str]:
    """List the ten rows of ours furthest from their roofline, from whatever records in the scope there are."""
    from ..report.data import sources
    from ..report.speedup import furthest_from_roofline

    records, problems = [], []
    for name in ("targets.json", "kernels.json", "end_to_end.json"):
        try:
            records += records_of(out / name, scope)
        except (ValueError, OSError, KeyError) as error:
            problems.append(f"{out / name} can't be read: {error}")
    rows = furthest_from_roofline(records, FURTHEST)
    if not rows:
        return [*problems, "furthest from their roofline: nothing was measured that has a roofline"]
    lines = [
        f"the {len(rows)} rows of ours furthest from their roofline",
        f"{'% of roofline':>13} {'p50 ms':>10} {'roofline ms':>11}  {'op':<20} {'mode':<9} {'dtype':<5} case",
    ]
    for row in rows:
        lines.append(
            f"{row.percent_of_roofline:13.1f} {row.p50_ms:10.4f} {row.roofline_ms or 0:11.4f}  {row.op:<20} "
            f"{row.mode:<9} {row.dtype:<5} {row.case}" + ("  noisy" if row.noisy else "")
        )
    return [*problems, *lines, *sources(rows)]


def verdict_table(out: Path, device: str, scope: Scope = None) -> list[str]:
    """List every target that the project is held to, judged by the records in the scope alone."""
    path = out / "targets.json"
    try:
        records = records_of(path, scope)
    except (ValueError, OSError, KeyError) as error:
        return [f"{path} can't be read: {error}"]
    if not records:
        return ["targets: none was measured"]
    from ..records.targets import TARGETS, judge
    from ..report.data import sources

    stored = {one["name"]: one for one in read_json(path).get("targets", [])}
    known = {name: one for name, one in stored.items() if one["kind"] == "flops"}  # by formula: they need no record
    found = [known[one.name] if one.name in known else judge(one, records, device).to_dict() for one in TARGETS]
    lines = ["the targets", f"{'verdict':<12} {'measured':>8} {'must be':>8}  {'target':<36} note"]
    for one in found:
        measured, target = (f"{one[name]:.2f}" if one[name] is not None else "-" for name in ("ratio", "target"))
        lines.append(f"{one['verdict']:<12} {measured:>8} {target:>8}  {one['name']:<36} {one['note']}")
    verdicts = [one["verdict"] for one in found]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in dict.fromkeys(verdicts))
    return [*lines, counts, *sources(records)]


def summary(results: Sequence[Done]) -> list[str]:
    """Return a line a step."""
    return [f"{done.name:<11} {done.status:<12} {done.seconds:5.0f} s  {done.detail}".rstrip() for done in results]
