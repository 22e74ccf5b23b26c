"""The report as Markdown: a page a device, pictures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..plotting import write_png
from ..records import markdown
from ..records.files import replacing
from .data import Results
from .sections import Cell, Chart, Section, Table


def page(results: Results, sections: Sequence[Section]) -> str:
    """Write a device's page."""
    lines = [f"# Benchmarks on {results.device}", ""]
    for section in sections:
        lines += ["", f"## {section.title}", "", section.text, ""]
        for part in section.parts:
            lines += [f"![{part.title}]({_file(results, part)})", ""] if isinstance(part, Chart) else _table(part)
        lines += [f"<sub>`{line.replace('`', '')}`</sub>  " for line in section.sources]
    return "\n".join(lines).rstrip() + "\n"


def pictures(results: Results, sections: Sequence[Section], folder: Path) -> list[Path]:
    """Draw the charts beside the page."""
    written = []
    for section in sections:
        for part in section.parts:
            if isinstance(part, Chart):
                path = folder / _file(results, part)
                with replacing(path) as scratch:
                    write_png(part.draw(), scratch)
                written.append(path)
    return written


def _file(results: Results, chart: Chart) -> str:
    return f"{results.slug}-{chart.name}.png"


def _table(table: Table) -> list[str]:
    lines = markdown.table(table.header, [[_cell(cell) for cell in row] for row in table.rows], table.text)
    if table.folded:
        return [f"<details><summary>{table.title}</summary>", "", *lines, "", "</details>", ""]
    return [f"**{table.title}**", "", *lines, ""]


def _cell(cell: str | Cell) -> str:
    return f"**{cell}**" if isinstance(cell, Cell) and cell.tone == "best" else str(cell)
