"""The report's pictures, for the docs: time against resolution, a roofline, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..records.record import Measurement
from ..table3.plot import FAINT, INK
from .data import family_of, side_of, total_bytes

# a colour and a marker each, so that neither alone has to be told apart
STYLES = {
    "hia": ("#0b7a75", "o"),
    "eager": ("#c44e52", "s"),
    "compile": ("#dd8452", "^"),
    "released": ("#8172b3", "D"),
    "released_compile": ("#b39bd4", "v"),
    "baseline": ("#c44e52", "s"),
    "anyres": ("#dd8452", "^"),
    "plain": ("#7a7a7a", "X"),
}
OTHERS = (("#4c72b0", "P"), ("#937860", "<"), ("#da8bc3", ">"), ("#64b5cd", "h"), ("#55a868", "p"))
PANELS = 6
LEGEND_INCHES = 2.0  # of the longest provider's name and its mark
MODES = ("forward", "both")


def styles(records: Sequence[Measurement]) -> dict[str, tuple[str, str]]:
    """A provider's colour and marker."""
    names = sorted({record.provider for record in records})
    unknown = [name for name in names if name not in STYLES]
    return {name: STYLES.get(name) or OTHERS[unknown.index(name) % len(OTHERS)] for name in names}


def curves(
    records: Sequence[Measurement], value: Callable[[Measurement], float | None]
) -> dict[tuple[str, str], dict[str, list[tuple[int, float]]]]:
    """(op, family of cases and mode) -> provider -> points by resolution, where there are two or more."""
    found: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for record in records:
        side, height = side_of(record), value(record)
        if record.status == "ok" and side is not None and height and record.mode in MODES:
            key = (record.op, f"{family_of(record)}, {record.mode}, {record.dtype}")
            found.setdefault(key, {}).setdefault(record.provider, []).append((side, height))
    long = {key: lines for key, lines in found.items() if max(len({x for x, _ in line}) for line in lines.values()) > 1}
    return dict(sorted(long.items(), key=lambda item: -sum(len(line) for line in item[1].values())))


def draw_curves(
    records: Sequence[Measurement], value: Callable[[Measurement], float | None], label: str, path: Path
) -> bool:
    """One panel an op, its fullest family of cases; False where no curve has two points."""
    found = curves(records, value)
    seen: Counter[str] = Counter()
    chosen = []
    for key in found:
        if seen[key[0]] == 0:
            chosen.append(key)
        seen[key[0]] += 1
    chosen = chosen[:PANELS]
    if not chosen:
        return False
    columns = min(3, len(chosen))
    figure, axes = _figure(columns, -(-len(chosen) // columns))
    look = styles(records)
    for axis, key in zip(axes, chosen):
        for provider, points in sorted(found[key].items(), key=lambda item: item[0] != "hia"):
            colour, marker = look[provider]
            x, y = zip(*sorted(points))
            width = 2.4 if provider == "hia" else 1.4
            axis.plot(x, y, color=colour, marker=marker, ms=5, lw=width, label=provider)
        _finish(axis, f"{key[0]}: {key[1]}", "image side, pixels", label)
        sides = sorted({x for points in found[key].values() for x, _ in points})
        axis.set_xticks(sides, [str(side) for side in sides])
        axis.minorticks_off()
    _save(figure, axes, path)
    return True


def draw_roofline(records: Sequence[Measurement], path: Path) -> bool:
    """Rate against intensity of every timed row that has FLOPs and bytes; False where none has."""
    points = [r for r in records if r.status == "ok" and r.flops and r.bytes and r.p50_ms]
    if not points:
        return False
    figure, axes = _figure(1, 1, width=7.5, height=5.0)
    look = styles(points)
    for provider in sorted({r.provider for r in points}, key=lambda name: name == "hia"):
        own = [r for r in points if r.provider == provider]
        x = [(r.flops or 0) / (r.bytes or 1) for r in own]
        y = [(r.flops or 0) / (r.p50_ms or 1) / 1e6 for r in own]
        colour, marker = look[provider]
        axes[0].scatter(x, y, s=26, color=colour, marker=marker, alpha=0.75, linewidths=0, label=provider)
    intensities = [(r.flops or 0) / (r.bytes or 1) for r in points]
    for bandwidth, rate, dtype in ceilings(points):
        ridge = rate / bandwidth
        xs = sorted({min(*intensities, ridge / 4), ridge, max(*intensities, ridge * 4)})
        axes[0].plot(xs, [min(rate, x * bandwidth) / 1e9 for x in xs], color=INK, lw=1.2, ls="--")
        # left of the corner, where no mark can be
        axes[0].annotate(
            f"measured limit, {dtype}",
            (ridge, rate / 1e9),
            (-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
            color=INK,
        )
    _finish(axes[0], "roofline: marks on the dashed line are at the hardware's limit", "FLOPs per byte", "GFLOP/s")
    _save(figure, axes, path)
    return True


def ceilings(records: Sequence[Measurement]) -> list[tuple[float, float, str]]:
    """(bytes per second, FLOPs per second, dtype) as the runs behind the records measured them.

    Of several runs the best: a limit is what the device can do. A run that measured none has no line; rooflines are
    no help there, since they count the least FLOPs that do the job and a record's FLOPs are the textbook's.
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


def _figure(columns: int, rows: int, width: float = 4.4, height: float = 3.6) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + 0.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _finish(axis: Any, title: str, x_label: str, y_label: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_xscale("log")
    axis.set_yscale("log")
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:,g}"))
        direction.set_minor_formatter(NullFormatter())
    axis.set_title(title, fontsize=9, color=INK, loc="left")
    axis.set_xlabel(x_label, fontsize=8.5, color=INK)
    axis.set_ylabel(y_label, fontsize=8.5, color=INK)
    axis.grid(True, which="major", color=FAINT, lw=0.6)
    axis.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _save(figure: Any, axes: Sequence[Any], path: Path) -> None:
    entries: dict[str, Any] = {}
    for axis in axes:
        if not axis.has_data():
            axis.set_axis_off()
        for handle, label in zip(*axis.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    names = sorted(entries, key=lambda name: (name != "hia", name))
    columns = max(2, int(figure.get_figwidth() // LEGEND_INCHES))  # more would be cut off at both sides
    figure.legend(
        [entries[name] for name in names], names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5
    )
    figure.savefig(path)


def draw_all(records: Sequence[Measurement], folder: Path, slug: str) -> list[str]:
    """Draw what the records allow.

    Returns:
        File names inside ``folder``.
    """
    memory = [record for record in records if record.level == "end_to_end"] or list(records)
    drawn = {
        f"{slug}-time.png": lambda path: draw_curves(records, lambda r: r.p50_ms, "ms", path),
        f"{slug}-roofline.png": lambda path: draw_roofline(records, path),
        f"{slug}-memory.png": lambda path: draw_curves(
            memory, lambda r: None if total_bytes(r) is None else (total_bytes(r) or 0) / 1e9, "GB", path
        ),
    }
    return [name for name, draw in drawn.items() if draw(folder / name)]
