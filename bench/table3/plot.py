"""The picture of Table 3: memory and FLOPs against resolution, the paper's points marked."""

from __future__ import annotations

from typing import Any

from ..plotting import COLOURS, INK, add_legend, finish, new_figure
from . import methods, paper

COLOUR = dict(zip(("hia", "baseline", "anyres", "released"), COLOURS, strict=False))
NAMES = {
    "baseline": "baseline",
    "anyres": "anyres (LLaVA-NeXT)",
    "released": "released HiA (port)",
    "hia": "HiA (ours)",
}
LINES = {"eager": "-", "sdpa": ":"}
MEMORY_TICKS = (1, 2, 5, 10, 15, 20, 25, 30, 35, 40, 50, 60, 80, 100, 150, 200, 300, 500)
HEADROOM = 5  # cards that the memory axis reaches
GB = 10**9
Rows = list[dict[str, Any]]


def figure_of(record: dict[str, Any]) -> Any:
    """Draw a record of table3.json, by matplotlib."""
    protocol, rows = record["protocol"], record["rows"]
    figure, (flops_axis, memory_axis) = new_figure(2, width=5.75, height=4.7)
    scale, unit = (2e12, "TMACs") if protocol.get("unit") == "macs" else (1e12, "TFLOPs")
    _draw_flops(flops_axis, rows, protocol["attention"][0], scale)
    _draw_memory(memory_axis, rows, protocol["attention"], protocol["card_gb"])
    _finish(flops_axis, rows, f"{unit} of a prefill")
    _finish(memory_axis, rows, "peak memory, GB")
    _cut(memory_axis, rows, protocol["card_gb"])
    add_legend(figure, (flops_axis, memory_axis), first=NAMES["hia"])
    figure.suptitle(
        f"{protocol['host']['name']}: {protocol['images_per_sample']} images and {protocol['text_tokens']} text "
        f"tokens, {protocol['dtype']}, prefill with KV cache",
        fontsize=10.5,
        color=INK,
    )
    return figure


def _series(rows: Rows, method: str, attention: str, name: str, scale: float) -> tuple[list[int], list[float]]:
    own = [row for row in rows if (row["method"], row["attention"]) == (method, attention) and row[name] is not None]
    points = sorted((row["resolution"], row[name] / scale) for row in own)
    return [x for x, _ in points], [y for _, y in points]


def _draw_flops(axis: Any, rows: Rows, attention: str, scale: float) -> None:
    for method in methods.METHODS:
        x, y = _series(rows, method, attention, "flops", scale)
        if x:
            axis.plot(x, y, "-o", color=COLOUR[method], ms=4, lw=1.8, label=NAMES[method])
    for method in ("baseline", "hia"):
        points = [(r, f.flops_t) for (name, r), f in paper.TABLE3.items() if name == method and _shown(rows, r)]
        axis.scatter(*_columns(points), **_marker(method), label=f"paper: {method}")


def _draw_memory(axis: Any, rows: Rows, attentions: list[str], card: float) -> None:
    for method in methods.METHODS:
        for attention in attentions:
            x, y = _series(rows, method, attention, "memory_bytes", GB)
            if x:
                axis.plot(x, y, LINES.get(attention, "-"), color=COLOUR[method], lw=1.8, marker="o", ms=3.5)
    for attention in attentions:
        axis.plot([], [], LINES.get(attention, "-"), color=INK, lw=1.5, label=f"memory with {attention} attention")
    for method in ("baseline", "hia"):
        figures = [(r, f.memory_gb) for (name, r), f in paper.TABLE3.items() if name == method and _shown(rows, r)]
        axis.scatter(*_columns([(r, gb) for r, gb in figures if gb is not None]), **_marker(method))
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


def _cut(axis: Any, rows: Rows, card: float) -> None:
    """Cut the axis where the differences between cards end, and say so."""
    from matplotlib.ticker import FixedLocator, NullLocator

    known = [row["memory_bytes"] / GB for row in rows if row["memory_bytes"] is not None] or [card]
    lowest, highest, top = min(known), max(known), HEADROOM * card
    axis.set_ylim(0.93 * min(lowest, card), min(1.2 * highest, top))
    ticks = [gb for gb in MEMORY_TICKS if lowest * 0.9 < gb < top]
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    axis.yaxis.set_minor_locator(NullLocator())
    if highest > top:
        axis.set_title(f"peak memory, GB (cut at {top:,.0f}; the highest is {highest:,.0f})", fontsize=9, loc="left")


def _shown(rows: Rows, resolution: int) -> bool:
    return any(row["resolution"] == resolution for row in rows)


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _marker(method: str) -> dict[str, Any]:
    return {"marker": "D", "s": 42, "facecolor": "none", "edgecolor": COLOUR[method], "linewidth": 1.6, "zorder": 5}


def _finish(axis: Any, rows: Rows, label: str) -> None:
    from matplotlib.ticker import NullLocator

    finish(axis, label, "image side, pixels")
    resolutions = sorted({row["resolution"] for row in rows})
    axis.set_xticks(resolutions, [str(resolution) for resolution in resolutions], rotation=45, fontsize=8)
    axis.xaxis.set_minor_locator(NullLocator())
