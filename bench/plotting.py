"""The look that the pictures of reports and tables share, as PNG for Markdown and as SVG inside an HTML page."""

from __future__ import annotations

import importlib.util
import io
import re
import zlib
from pathlib import Path
from typing import Any

INK, SOFT, FAINT = "#1c2226", "#57626a", "#dfe4e7"
# a colour on white, and its counterpart on a dark page
DARK = {
    INK: "#e8edef",
    SOFT: "#a3b0b7",
    FAINT: "#2e383e",
    "#0b7a75": "#4fd1c5",
    "#c2410c": "#fb923c",
    "#4c5fd7": "#93a5ff",
    "#9333a8": "#dd95f0",
    "#6b7280": "#a8b3bb",
    "#a16207": "#eac54f",
    "#be185d": "#f78fb9",
    "#0369a1": "#6cc5f5",
    "#4d7c0f": "#b3dc6a",
    "#7f1d1d": "#f1a3a3",
}
COLOURS = tuple(DARK)[3:]
MARKERS = "os^DvPX<>hd*"
# a provider has one colour and one marker everywhere, so that neither alone has to be told apart
STYLES = {
    "hia": (0, 0),
    "eager": (1, 1),
    "compile": (2, 2),
    "released": (3, 3),
    "released_compile": (4, 4),
    "channels_last": (5, 5),
    "channels_last_compile": (6, 6),
    "eager_rgb": (7, 7),
    "sdpa_math": (8, 8),
    "sdpa_flash": (9, 9),
    "baseline": (1, 5),
    "anyres": (2, 6),
    "plain": (4, 1),
    "textbook": (7, 0),
    "gemms": (5, 4),
}
LEGEND_INCHES = 1.9  # of the longest provider's name and its mark


def unavailable() -> str | None:
    """Say why no picture can be drawn; None if one can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed (pip install 'hia-kernels[bench]')"
    return None


def style_of(provider: str) -> dict[str, str]:
    """Return a provider's colour and marker; one that has none is given some by its name."""
    number = sum(map(ord, provider))
    colour, marker = STYLES.get(provider, (1 + number % (len(COLOURS) - 1), 10 + number % 2))
    return {"color": COLOURS[colour], "marker": MARKERS[marker]}


def new_figure(columns: int = 1, rows: int = 1, width: float = 4.4, height: float = 3.4) -> tuple[Any, list[Any]]:
    """Make a figure of so many panels of that size in inches, and list them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + 0.5), dpi=130, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def finish(axis: Any, title: str, x_label: str, y_label: str = "", *, log: str = "xy") -> None:
    """Give a panel its titles, logarithmic axes and a grid."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name, direction in (("x", axis.xaxis), ("y", axis.yaxis)):
        if name in log:
            getattr(axis, f"set_{name}scale")("log")
            direction.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:,g}"))
            low, high = direction.get_view_interval()
            if high < 100 * low:
                direction.set_major_locator(LogLocator(subs=(1, 2, 5)))
            direction.set_minor_formatter(NullFormatter())
    axis.set_title(title, fontsize=9, color=INK, loc="left")
    axis.set_xlabel(x_label, fontsize=8.5, color=INK)
    axis.set_ylabel(y_label, fontsize=8.5, color=INK)
    axis.set_facecolor("none")
    axis.set_axisbelow(True)
    axis.grid(True, which="major", color=FAINT, lw=0.6)
    axis.tick_params(labelsize=8, colors=INK, which="both")
    for side, spine in axis.spines.items():
        spine.set_color(FAINT)
        spine.set_visible(side in ("left", "bottom"))


def add_legend(figure: Any, axes: Any, first: str = "hia") -> None:
    """Put one legend for all panels below them; panels without data disappear."""
    entries: dict[str, Any] = {}
    for axis in axes:
        if not axis.has_data():
            axis.set_axis_off()
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    names = sorted(entries, key=lambda name: (name != first, name))
    columns = max(2, int(figure.get_figwidth() // LEGEND_INCHES))  # more would be cut off at both sides
    handles = [entries[name] for name in names]
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5, labelcolor=INK
    )


def write_png(figure: Any, path: Path) -> None:
    """Write the figure, on white."""
    figure.savefig(path, format="png", metadata={"Software": None})


def inline_svg(figure: Any, name: str, says: str) -> str:
    """Return the figure as an element of an HTML page: without addresses, in colours that follow the page's theme.

    Args:
        figure: matplotlib's.
        name: of the chart; no two of a page may share it.
        says: the chart in words.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)
    text = text[text.index(">", text.index("<svg")) + 1 :]
    for what in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->", r"<defs>\s*</defs>"):
        text = re.sub(what, "", text, flags=re.DOTALL)
    text = re.sub(r"\s*\n\s*", " ", text).strip()
    names: dict[str, str] = {}  # ids that something refers to, by short ones of this chart's own
    for found in re.finditer(r'"#([^"]+)"|url\(#([^)]+)\)', text):
        names.setdefault(found[1] or found[2], f"c{zlib.crc32(name.encode()) % 2**16:x}-{len(names)}")
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{names[found[1]]}"' if found[1] in names else "", text)
    text = re.sub(r'xlink:href="#([^"]+)"', lambda found: f'href="#{names[found[1]]}"', text)
    text = re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{names[found[1]]})", text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda found: f"var(--{found[0][1:]})" if found[0] in DARK else found[0], text)
    # coordinates, and not the numbers that labels show
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d\d+", lambda found: f"{float(found[0]):.1f}", tag[0]), text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family:[^;\"]*;? ?", "", text)
    return f'<svg class="chart" role="img" aria-label="{says}" {box[0] if box else ""}>{text}'


def colour_rules(dark: bool) -> str:
    """Return the page's declarations of the colours that :func:`inline_svg` names."""
    return " ".join(f"--{light[1:]}: {DARK[light] if dark else light};" for light in DARK)
