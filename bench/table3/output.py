"""Table 3 as it leaves the program: the terminal, JSON, Markdown, a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from hia.encoder.encoder import GROUP_PIXELS

from ..plotting import unavailable, write_png
from ..records.files import replacing, write_json, write_text
from ..records.markdown import table
from . import methods, paper
from .hosts import LLAVA_13B
from .plot import figure_of
from .rows import BYTES_PER_GB, Claim, Report, Row

JSON = "table3.json"
TEXT = ("method", "attention", "note")  # columns of words


def main_cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Make header and rows of the predicted table, the paper's figure beside ours in every row."""
    attentions = report.protocol.attention
    unit, scale = report.protocol.flops_unit()
    header = ["px", "method", "tokens", unit, "paper", "base/this", "paper"]
    header += [f"GB {name}" for name in attentions] + ["paper"]
    header += [f"base/this {name}" for name in attentions] + ["paper"]
    cells: list[list[str]] = []
    for resolution, method in ordered_cases(report):
        rows = [report.find(resolution, method, name) for name in attentions]
        base = [report.find(resolution, "baseline", name) for name in attentions]
        first = next(row for row in rows if row is not None)
        line = [str(resolution), method, f"{first.tokens:,}", _tera(first.flops, scale), _paper_flops(first)]
        line += [_ratio(base[0] and base[0].flops, first.flops), _paper_ratio(method, paper.flops_ratio(resolution))]
        line += [_memory(row) for row in rows] + [_paper_memory(first)]
        line += [_ratio(b and b.memory_bytes, row and row.memory_bytes) for b, row in zip(base, rows, strict=True)]
        cells.append([*line, _paper_ratio(method, paper.memory_ratio(resolution))])
    return header, cells


def layer_lines(report: Report) -> list[str]:
    """Say our layers' FLOPs over the released maths', a number a resolution; nothing where the rows are missing."""
    found = report.layers()
    if not found:
        return []
    ratios = ", ".join(f"{entry.resolution} px {entry.ratio:.2f}" for entry in found)
    return [f"FLOPs of the HiA layers without the CNN, hia / released: {ratios}."]


def ordered_cases(report: Report) -> list[tuple[int, str]]:
    """List (resolution, method) of the predicted rows, as the table shows them."""
    cases = {(row.resolution, row.method) for row in report.rows}
    return sorted(cases, key=lambda case: (case[0], methods.METHODS.index(case[1])))


def _tera(flops: int | None, scale: int) -> str:
    return "-" if flops is None else f"{flops / scale:,.1f}"


def _paper_flops(row: Row) -> str:
    return "-" if row.paper_flops_t is None else f"{row.paper_flops_t:g}"


def _memory(row: Row | None) -> str:
    if row is None or row.memory_bytes is None:
        return "-"
    return f"{row.memory_bytes / BYTES_PER_GB:,.1f}" + ("" if row.fits else " x")


def _paper_memory(row: Row) -> str:
    if row.paper_out_of_memory:
        return "x"
    return "-" if row.paper_memory_gb is None else f"{row.paper_memory_gb:g}"


def _ratio(base: int | None, this: int | None) -> str:
    return "-" if not base or not this else f"{base / this:.2f}"


def _paper_ratio(method: str, ratio: float | None) -> str:
    if method == "baseline" and ratio is not None:
        return "1.00"
    return "-" if method != "hia" or ratio is None else f"{ratio:.2f}"


def measured_cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Make header and rows of what was really run."""
    header = ["px", "method", "attention", "tokens", "measured MB", "predicted MB", "deviation"]
    header += ["prefill ms", "baseline / this: MB", "ms", "note"]
    bases = {row.key: row for row in report.measured if row.memory_kind != "out of memory, provoked"}
    cells = []
    for row in sorted(report.measured, key=lambda row: (row.attention, row.resolution, row.method)):
        base = bases.get((row.resolution, "baseline", row.attention))
        deviation = row.prediction_deviation
        cells.append(
            [
                str(row.resolution),
                row.method,
                row.attention,
                f"{row.tokens:,}",
                _mega(row.memory_bytes),
                _mega(row.predicted_bytes),
                "-" if deviation is None else f"{deviation:+.1%}",
                "-" if row.prefill_ms is None else f"{row.prefill_ms:,.0f}",
                _ratio(base and base.memory_bytes, row.memory_bytes),
                "-" if not (base and base.prefill_ms and row.prefill_ms) else f"{base.prefill_ms / row.prefill_ms:.2f}",
                "" if row.memory_kind.startswith("measured") else row.memory_kind,
            ]
        )
    return header, cells


def _mega(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.0f}"


def print_report(report: Report, console: Console) -> None:
    """Print the tables, the checks and the notes."""
    protocol = report.protocol
    header, cells = main_cells(report)
    title = f"Table 3, {protocol.host.name}: predicted, beside the paper's figures"
    console.print(_rich_table(title, header, cells, emphasise=("hia",)))
    if report.measured:
        header, cells = measured_cells(report)
        console.print(_rich_table(f"Really run: {report.measured_host}", header, cells, emphasise=("hia",)))
    for line in layer_lines(report):
        console.print(line, highlight=False, soft_wrap=True)
    for claim in report.claims():
        console.print(_claim_line(claim, rich=True))
    for note in [*report.notes, *(f"not measured: {reason}" for reason in report.skipped)]:
        console.print(f"- {note}", highlight=False, markup=False)


def _rich_table(title: str, header: list[str], cells: list[list[str]], emphasise: tuple[str, ...]) -> Table:
    table = Table(title=title, header_style="bold", title_style="bold")
    for index, name in enumerate(header):
        paper_style = "cyan" if name == "paper" else None
        table.add_column(name, justify="left" if index in (1, len(header)) else "right", style=paper_style)
    for index, line in enumerate(cells):
        last_of_group = index + 1 == len(cells) or cells[index + 1][0] != line[0]
        painted = [f"[red]{cell}[/]" if cell.endswith(" x") else cell for cell in line]
        table.add_row(*painted, style="bold" if line[1] in emphasise else None, end_section=last_of_group)
    return table


def _claim_line(claim: Claim, *, rich: bool = False) -> str:
    word = {True: "PASS", False: "FAIL", None: "not checked"}[claim.passed]
    if rich:
        colour = {True: "green", False: "red", None: "yellow"}[claim.passed]
        word = f"[{colour}]{word}[/]"
    return f"{word}: {claim.text}: {claim.detail}"


def to_markdown(report: Report, picture: str | None) -> str:
    """Write the same as a page."""
    environment = report.environment
    dirty = " (with uncommitted changes)" if environment.get("dirty") else ""
    lines = ["# Table 3", "", f"`{environment.get('command')}`, commit {environment.get('commit')}{dirty},"]
    lines += [f"{environment.get('device')}, {environment.get('date')}, {report.wall_s:.0f} s.", ""]
    if report.interrupted:
        lines += ["**Interrupted: what follows is incomplete.**", ""]
    if picture:
        lines += [f"![memory and FLOPs against resolution]({picture})", ""]
    lines += [f"## {report.protocol.host.name}, predicted", ""]
    lines += [*table(*main_cells(report), TEXT), "", "x: more than the card has.", ""]
    if report.layers():
        lines += [*layer_lines(report), ""]
    if report.measured:
        lines += [f"## Really run: {report.measured_host}", "", *table(*measured_cells(report), TEXT), ""]
    lines += ["## Checks", "", *(f"- {_claim_line(claim)}" for claim in report.claims()), ""]
    lines += ["## Notes", "", *(f"- {note}" for note in report.notes)]
    lines += [f"- not measured: {reason}" for reason in report.skipped]
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items() if version)
    lines += [
        f"- {environment.get('threads')} threads on {environment.get('cpu')}; Python "
        f"{environment.get('python')}, {versions}."
    ]
    return "\n".join(lines) + "\n"


def write_report(report: Report, folder: Path, json_path: Path | None) -> list[Path]:
    """Write table3.json, table3.md and, with matplotlib, table3.png to ``folder``; JSON to ``json_path`` too.

    Returns:
        The files written.
    """
    written = []
    picture: str | None = None
    if report.rows:
        reason = unavailable()
        if reason is None:
            picture = "table3.png"
            with replacing(folder / picture) as scratch:
                write_png(figure_of(report.to_dict()), scratch)
            written.append(folder / picture)
        else:
            report.notes.append(f"no table3.png: {reason}")
    for path in filter(None, (folder / JSON, json_path)):
        written.append(write_json(path, report.to_dict()))
    written.append(write_text(folder / "table3.md", to_markdown(report, picture)))
    return written


def add_notes(report: Report, images: str) -> None:
    """Add what a reader must know to use the numbers, of the images in words of their own."""
    protocol = report.protocol
    lines = [
        f"protocol: {protocol.host.name}, {protocol.images_per_sample} images and {protocol.text_tokens} text tokens "
        f"in one sample, {protocol.dtype}, prefill with KV cache, logits of the last token. {protocol.unit} shown; "
        f"1 multiply-add is 2 FLOPs; matrix products and convolutions counted, attention in full.",
        "the paper doesn't say whether it counts FLOPs or multiply-adds, one image or two, eager or fused attention, "
        "with or without a KV cache; the ratio baseline / HiA doesn't depend on the first of these.",
        f"GB are 1e9 bytes: the stricter reading of the paper's GB and of a {protocol.card_gb:g} GB card."
        + readings_differ(report),
        "memory is weights, activations, KV cache and inputs; kernels' own workspace, the CUDA context and "
        "fragmentation come on top. SDPA is followed as on CUDA: the flash kernel, or the memory-efficient one under "
        "a mask. transformers keeps every CLIP layer's output until the projector has run.",
    ]
    if protocol.host == LLAVA_13B:
        lines.append("the vocabulary is LLaMA-2's 32,000; Chinese-LLaMA-2's 55,296 would add 0.48 GB in 16 bits.")
    baseline = [row for row in report.rows if row.method == "baseline"]
    beyond = sorted(row.resolution for row in baseline if row.tokens > protocol.host.context)
    if beyond:
        lines.append(
            f"with {protocol.images_per_sample} images the baseline's sequence exceeds the LLM's "
            f"{protocol.host.context:,}-token context from {beyond[0]} px on; the paper's convention is unknown."
        )
    if any(row.method == "anyres" for row in report.rows):
        lines.append("anyres is cut into the same tiles at every size from 448 px on, so its cost stays the same.")
    cut = sorted({row.resolution for row in report.rows if row.method == "hia" and row.resolution**2 > GROUP_PIXELS})
    if cut:
        lines.append(
            f"hia's encoder takes {', '.join(map(str, cut))} px in strips where that would need more than the prefill "
            f'(max_activation_bytes="auto"); a card with enough free memory takes them whole.'
        )
    if any(row.method == "released" for row in report.rows):
        lines.append("released is our port of that code's maths, with random weights; no code was copied.")
    if report.measured_host is not None:
        lines.append(f"images of the real runs: {images}; text by {report.images.get('tokenizer')}.")
    report.notes += lines


def readings_differ(report: Report) -> str:
    """Name the rows that would fit if the card's GB were GiB."""
    card = report.protocol.card_gb * 2**30
    rows = [row for row in report.rows if not row.fits and row.memory_bytes is not None and row.memory_bytes <= card]
    if not rows:
        return " No row's x depends on it."
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(f"{row.method} ({row.attention})", []).append(str(row.resolution))
    listed = "; ".join(f"{name} at {', '.join(sizes)}" for name, sizes in groups.items())
    return f" In GiB these would fit too: {listed}."
