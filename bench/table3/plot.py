"""table3.png: memory and FLOPs against resolution, the paper's points marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import methods, paper
from .rows import BYTES_PER_GB, Report

COLOURS = {"baseline": "#c44e52", "anyres": "#dd8452", "released": "#8172b3", "hia": "#2b7a78"}
NAMES = {
    "baseline": "baseline",
    "anyres": "anyres (LLaVA-NeXT)",
    "released": "released HiA (port)",
    "hia": "HiA (ours)",
}
LINES = {"eager": "-", "sdpa": ":"}
MEMORY_TICKS = (1, 2, 5, 10, 15, 20, 25, 30, 35, 40, 50, 60, 80, 100, 150, 200, 300, 500)
HEADROOM = 5  # cards that the memory axis reaches
INK, FAINT = "#222222", "#d9d9d9"


def plotting_unavailable() -> str | None:
    """Why no picture can be drawn; None if one can."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "matplotlib is not installed (pip install 'hia-kernels[bench]')"
    return None


def draw(report: Report, path: Path) -> None:
    """Write the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 5.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    flops_axis, memory_axis = figure.subplots(1, 2)
    for axis in (flops_axis, memory_axis):
        axis.set_yscale("log")
    unit, scale = report.protocol.flops_unit()
    _draw_flops(flops_axis, report, scale)
    _draw_memory(memory_axis, report)
    _finish(flops_axis, report, f"{unit} of a prefill")
    _finish(memory_axis, report, "peak memory, GB" + _cut(memory_axis, report))
    handles, labels = _legend(flops_axis, memory_axis)
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    protocol = report.protocol
    figure.suptitle(
        f"{protocol.host.name}: {protocol.images_per_sample} images and {protocol.text_tokens} text tokens, "
        f"{protocol.dtype}, prefill with KV cache",
        fontsize=10.5,
        color=INK,
    )
    figure.savefig(path)


def _series(report: Report, method: str, attention: str, name: str) -> tuple[list[int], list[float]]:
    rows = [row for row in report.rows if row.method == method and row.attention == attention]
    points = sorted((row.resolution, getattr(row, name)) for row in rows if getattr(row, name) is not None)
    return [x for x, _ in points], [y for _, y in points]


def _draw_flops(axis: Any, report: Report, scale: int) -> None:
    for method in methods.METHODS:
        x, y = _series(report, method, report.protocol.attention[0], "flops")
        if x:
            label = NAMES[method]
            axis.plot(x, [value / scale for value in y], "-o", color=COLOURS[method], ms=4, lw=1.8, label=label)
    for method in ("baseline", "hia"):
        points = [(r, f.flops_t) for (name, r), f in paper.TABLE3.items() if name == method and _shown(report, r)]
        axis.scatter(*_columns(points), **_marker(method), label=f"paper: {method}")


def _draw_memory(axis: Any, report: Report) -> None:
    for method in methods.METHODS:
        for attention in report.protocol.attention:
            x, y = _series(report, method, attention, "memory_bytes")
            if x:
                gigabytes = [value / BYTES_PER_GB for value in y]
                axis.plot(x, gigabytes, LINES.get(attention, "-"), color=COLOURS[method], lw=1.8, marker="o", ms=3.5)
    for attention in report.protocol.attention:
        axis.plot([], [], LINES.get(attention, "-"), color=INK, lw=1.5, label=f"memory with {attention} attention")
    for method in ("baseline", "hia"):
        figures = [(r, f.memory_gb) for (name, r), f in paper.TABLE3.items() if name == method and _shown(report, r)]
        axis.scatter(*_columns([(r, gb) for r, gb in figures if gb is not None]), **_marker(method))
    card = report.protocol.card_gb
    axis.axhline(card, color=INK, lw=1, ls="--")
    axis.annotate(
        f"card: {card:g} GB",
        (0.52, card),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=8,
        color=INK,
    )


def _cut(axis: Any, report: Report) -> str:
    """Cut the axis where the differences between cards end; returns what the title must add."""
    card = report.protocol.card_gb
    highest = max((row.memory_bytes or 0) / BYTES_PER_GB for row in report.rows)
    lowest = min((row.memory_bytes or 0) / BYTES_PER_GB for row in report.rows)
    top = HEADROOM * card
    axis.set_ylim(0.93 * min(lowest, card), min(1.2 * highest, top))
    ticks = [gb for gb in MEMORY_TICKS if lowest * 0.9 < gb < top]
    axis.set_yticks(ticks, minor=False)
    return f" (cut at {top:,.0f}; the highest is {highest:,.0f})" if highest > top else ""


def _shown(report: Report, resolution: int) -> bool:
    return any(row.resolution == resolution for row in report.rows)


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _marker(method: str) -> dict[str, Any]:
    return {"marker": "D", "s": 42, "facecolor": "white", "edgecolor": COLOURS[method], "linewidth": 1.6, "zorder": 5}


def _finish(axis: Any, report: Report, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    axis.set_xscale("log")
    resolutions = sorted({row.resolution for row in report.rows})
    axis.set_xticks(resolutions, [str(resolution) for resolution in resolutions], rotation=45, fontsize=8)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:,g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("image side, pixels", fontsize=9, color=INK)
    axis.set_title(label, fontsize=10, color=INK, loc="left")
    axis.grid(True, which="major", color=FAINT, lw=0.6)
    axis.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _legend(*axes: Any) -> tuple[list[Any], list[str]]:
    handles: list[Any] = []
    labels: list[str] = []
    for axis in axes:
        more_handles, more_labels = axis.get_legend_handles_labels()
        handles += more_handles
        labels += more_labels
    return handles, labels
