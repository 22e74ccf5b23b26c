"""The report as one self-contained HTML page: style, charts and script inline, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..plotting import colour_rules, inline_svg
from .data import Results
from .sections import WRAPPED, Cell, Chart, Section, Table

ASSETS = Path(__file__).resolve().parent / "assets"


def render(devices: Sequence[tuple[Results, Sequence[Section]]]) -> str:
    """Write the page of all devices; it needs no JavaScript, which only makes its tables sortable."""
    script, style = (ASSETS / "report.js").read_text("utf-8"), (ASSETS / "report.css").read_text("utf-8")
    parts = {
        "STYLE": style.replace("/*LIGHT*/", colour_rules(dark=False)).replace("/*DARK*/", colour_rules(dark=True)),
        "SCRIPT": script,
        # only this script may run: a record's text can't become one
        "HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "NAV": "".join(f'<a href="#{device.slug}">{escape(device.device)}</a>' for device, _ in devices),
        "MAIN": "\n".join(_device(*device) for device in devices),
    }
    page = (ASSETS / "report.html").read_text("utf-8")
    for mark, part in parts.items():
        before, _, after = page.partition(f"<!--{mark}-->" if mark in ("NAV", "MAIN") else f"/*{mark}*/")
        page = before + part + after
    return page


def _device(results: Results, sections: Sequence[Section]) -> str:
    links = "".join(f'<a href="#{results.slug}-{one.key}">{escape(one.title)}</a>' for one in sections)
    body = "\n".join(_section(results.slug, section) for section in sections)
    title = f'<h2>{escape(results.device)}</h2><nav aria-label="Sections">{links}</nav>'
    return f'<article id="{results.slug}"><header>{title}</header>\n{body}</article>'


def _section(slug: str, section: Section) -> str:
    key = f"{slug}-{section.key}"
    parts = "\n".join(
        _chart(f"{key}-{part.name}", part) if isinstance(part, Chart) else _table(part) for part in section.parts
    )
    runs = "".join(f"<li><code>{escape(line)}</code></li>" for line in section.sources)
    count = "1 run" if len(section.sources) == 1 else f"{len(section.sources)} runs"
    source = f"<details><summary>Measured by {count}</summary><ul>{runs}</ul></details>"
    return (
        f'<section id="{key}" aria-labelledby="{key}-title"><h3 id="{key}-title">{escape(section.title)}</h3>'
        f"<p>{escape(section.text)}</p>\n{parts}\n{source if section.sources else ''}</section>"
    )


def _chart(name: str, chart: Chart) -> str:
    svg = inline_svg(chart.draw(), name, escape(chart.says))
    return f'<figure><figcaption>{escape(chart.title)}</figcaption><div class="scroll">{svg}</div></figure>'


def _table(table: Table) -> str:
    kinds = ["w" if name in WRAPPED else "" if name in table.text else "n" for name in table.header]
    head = "".join(f"<th{_class(kind)}>{escape(name)}</th>" for name, kind in zip(table.header, kinds))
    rows = ("".join(_cell(cell, kind) for cell, kind in zip(row, kinds)) for row in table.rows)
    lines = "\n".join(f"<tr>{row}</tr>" for row in rows)
    title = escape(table.title)
    body = f"<table><thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table>"
    body = f'<div class="scroll" role="region" aria-label="{title}" tabindex="0">{body}</div>'
    return f"<details><summary>{title}</summary>{body}</details>" if table.folded else f"<h4>{title}</h4>{body}"


def _cell(cell: str | Cell, kind: str) -> str:
    if isinstance(cell, str):
        return f"<td{_class(kind)}>{escape(cell)}</td>"
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    return f"<td{_class(kind, cell.tone)}>{escape(cell.text)}{note}</td>"


def _class(*names: str) -> str:
    joined = " ".join(filter(None, names))
    return f' class="{joined}"' if joined else ""
