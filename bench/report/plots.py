"""The report's charts. Each maker returns what draws a chart, or None where the records allow none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..plotting import INK, SOFT, add_legend, finish, new_figure, style_of
from ..records.record import Measurement
from .data import family_of, side_of
from .speedup import OURS, Speedup, is_peer

PANELS = 6
CURVES = ("forward", "both")  # modes
Draw = Callable[[], Any]
Value = Callable[[Measurement], float | None]


def speedup_chart(found: Sequence[Speedup]) -> Draw | None:
    """Show every peer's time over ours, a row an op: forward, or the whole step where there is no forward alone."""
    chosen: dict[str, Speedup] = {}
    for one in sorted(found, key=lambda one: CURVES.index(one.mode) if one.mode in CURVES else len(CURVES)):
        if one.mode in CURVES:
            chosen.setdefault(one.op, one)
    if not chosen:
        return None

    def draw() -> Any:
        rows = sorted(chosen.values(), key=lambda one: one.ratio)
        figure, (axis,) = new_figure(width=9.5, height=0.7 + 0.26 * len(rows))
        for provider in sorted({name for one in rows for name in one.against}):
            points = [(one.against[provider][0], place) for place, one in enumerate(rows) if provider in one.against]
            x, y = zip(*points, strict=True)
            axis.scatter(x, y, s=30, linewidths=0, alpha=0.9, label=provider, **style_of(provider))
        axis.axvline(1, color=INK, lw=1.2)
        finish(axis, "", "peer's time / ours: right of the line ours is faster", log="x")
        ticks = [tick for tick in (0.1, 0.2, 0.5, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20) if _within(tick, axis.get_xlim())]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_yticks(range(len(rows)), [one.op for one in rows])
        add_legend(figure, [axis])
        return figure

    return draw


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def curves(records: Sequence[Measurement], value: Value) -> dict[tuple[str, str], dict[str, list[tuple[int, float]]]]:
    """Collect (op, family of cases and mode) -> provider -> points by resolution, where there are two or more."""
    found: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for record in records:
        side, height = side_of(record), value(record)
        if record.status != "ok" or record.extra.get("limit"):
            continue
        if side is not None and height and record.mode in CURVES:
            key = (record.op, f"{family_of(record)}, {record.mode}, {record.dtype}")
            found.setdefault(key, {}).setdefault(record.provider, []).append((side, height))
    long = {key: lines for key, lines in found.items() if max(len({x for x, _ in line}) for line in lines.values()) > 1}
    return dict(sorted(long.items(), key=lambda item: -sum(len(line) for line in item[1].values())))


def curves_chart(records: Sequence[Measurement], value: Value, label: str) -> Draw | None:
    """Show a value against the images' side: one panel an op, its fullest family of cases."""
    found = curves(records, value)
    fullest: dict[str, tuple[str, str]] = {}
    for key in found:
        fullest.setdefault(key[0], key)
    chosen = list(fullest.values())[:PANELS]
    if not chosen:
        return None

    def draw() -> Any:
        columns = min(3, len(chosen))
        figure, axes = new_figure(columns, -(-len(chosen) // columns))
        for axis, key in zip(axes, chosen, strict=False):
            for provider, points in sorted(found[key].items(), key=lambda item: item[0] != OURS):
                x, y = zip(*sorted(points), strict=True)
                width = 2.2 if provider == OURS else 1.3
                axis.plot(x, y, ms=5, lw=width, label=provider, **style_of(provider))
            finish(axis, f"{key[0]}: {key[1]}", "image side, pixels", label)
            sides = sorted({x for points in found[key].values() for x, _ in points})
            axis.set_xticks(sides, [str(side) for side in sides])
            axis.minorticks_off()
        add_legend(figure, axes)
        return figure

    return draw


def roofline_chart(records: Sequence[Measurement]) -> Draw | None:
    """Show rate against intensity of ours and of the fastest peer of each case."""
    rows = [r for r in records if r.status == "ok" and r.flops and r.bytes and r.p50_ms and r.mode != "dispatch"]
    ours = [record for record in rows if record.provider == OURS]
    fastest: dict[tuple[str, ...], Measurement] = {}
    for record in sorted((r for r in rows if is_peer(r)), key=lambda record: record.p50_ms or 0.0):
        fastest.setdefault((record.op, record.case, record.mode, record.dtype), record)
    if not ours:
        return None

    def draw() -> Any:
        figure, (axis,) = new_figure(width=9.5, height=4.6)
        for label, own, style in (
            ("the fastest peer", list(fastest.values()), {"color": SOFT, "marker": "x", "alpha": 0.7}),
            ("ours", ours, {"linewidths": 0, "alpha": 0.9, **style_of(OURS)}),
        ):
            if own:
                x = [(r.flops or 0) / (r.bytes or 1) for r in own]
                y = [(r.flops or 0) / (r.p50_ms or 1) / 1e6 for r in own]
                axis.scatter(x, y, s=26, label=label, **style)
        intensities = [(r.flops or 0) / (r.bytes or 1) for r in rows]
        for bandwidth, rate, dtype in ceilings(rows):
            ridge = rate / bandwidth
            xs = sorted({min(*intensities, ridge / 4), ridge, max(*intensities, ridge * 4)})
            axis.plot(xs, [min(rate, x * bandwidth) / 1e9 for x in xs], color=INK, lw=1.2, ls="--")
            # left of the corner, where no mark can be
            axis.annotate(
                f"measured limit, {dtype}",
                (ridge, rate / 1e9),
                (-6, 4),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=8,
                color=INK,
            )
        finish(axis, "", "FLOPs per byte", "GFLOP/s")
        add_legend(figure, [axis], first="ours")
        return figure

    return draw


def ceilings(records: Sequence[Measurement]) -> list[tuple[float, float, str]]:
    """List (bytes per second, FLOPs per second, dtype) as the runs behind the records measured them.

    Of several runs the best: a limit is what the device can do. A run that measured none has no line; rooflines in
    milliseconds are no help there, since they count the least FLOPs that do the job and a record's FLOPs are the
    textbook's.
    """
    found: dict[str, tuple[float, float]] = {}
    for record in records:
        limits = record.environment.get("limits") or {}
        bandwidth = limits.get("bandwidth_gb_per_s")
        rate = (limits.get("gemm_gflop_per_s") or {}).get(record.dtype)
        if bandwidth and rate:
            known = found.get(record.dtype, (0.0, 0.0))
            found[record.dtype] = (max(known[0], bandwidth * 1e9), max(known[1], rate * 1e9))
    return [(bandwidth, rate, dtype) for dtype, (bandwidth, rate) in sorted(found.items())]
