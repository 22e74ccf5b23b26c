"""Table 3 in README.md, from a committed record: ``python -m bench table3 --readme`` writes it between two markers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..records import markdown
from ..records.environment import REPOSITORY
from ..records.files import RESULTS, read_json, write_text

RECORD = RESULTS / "amd-epyc" / "table3.json"
README = REPOSITORY / "README.md"
START, END = "<!-- table3: written by python -m bench table3 --readme -->", "<!-- /table3 -->"
TITLES = "px", "TFLOPs: baseline / HiA", "paper", "ratio", "paper", "GB, eager: baseline / HiA", "paper", "GB, SDPA"


def table(record: dict[str, Any]) -> str:
    """Write the baseline's and HiA's rows as Markdown; x: more than the card holds."""
    found = {(row["resolution"], row["method"], row["attention"]): row for row in record["rows"]}
    lines = []
    for resolution in sorted({key[0] for key in found}):
        rows = {
            (method, attention): found[resolution, method, attention]
            for method in ("baseline", "hia")
            for attention in ("eager", "sdpa")
        }
        base, hia = rows["baseline", "eager"], rows["hia", "eager"]
        paper = base["paper_flops_t"], hia["paper_flops_t"]
        memory = [" / ".join(_gigabytes(rows[method, a]) for method in ("baseline", "hia")) for a in ("eager", "sdpa")]
        cells = [
            str(resolution),
            f"{base['flops'] / 1e12:,.1f} / {hia['flops'] / 1e12:.1f}",
            f"{paper[0]:g} / {paper[1]:g}" if all(paper) else "",
            f"{base['flops'] / hia['flops']:.2f}",
            f"{paper[0] / paper[1]:.2f}" if all(paper) else "",
            memory[0],
            f"{_paper_gigabytes(base)} / {_paper_gigabytes(hia)}" if all(paper) else "",
            memory[1],
        ]
        lines.append(cells)
    return "\n".join(markdown.table(TITLES, lines, text=()))


def _gigabytes(row: dict[str, Any]) -> str:
    return f"{row['memory_bytes'] / 1e9:,.1f}" + ("" if row["fits"] else " x")


def _paper_gigabytes(row: dict[str, Any]) -> str:
    return "x" if row["paper_out_of_memory"] else f"{row['paper_memory_gb']:g}"


def block(record: dict[str, Any]) -> str:
    """Write the table and where it comes from, between the markers."""
    protocol, environment = record["protocol"], record["environment"]
    source = (
        f"`{environment['command']}` at commit {environment['commit'][:12]}, {environment['device']}, torch "
        f"{environment['versions']['torch']}, transformers {environment['versions']['transformers']}: "
        f"{protocol['host']['name']}, {protocol['images_per_sample']} images and {protocol['text_tokens']} text "
        f"tokens, {protocol['dtype']}, prefill with KV cache; FLOPs counted and memory predicted under fake tensors; "
        f"x: more than {protocol['card_gb']:g} GB. [All rows and methods]({_relative(RECORD.with_suffix('.md'))})."
    )
    layers = record.get("layers") or []
    ratios = ", ".join(f"{entry['resolution']} px {entry['ratio']:.2f}" for entry in layers)
    beside = [f"FLOPs of the HiA layers without the CNN, ours over the released maths': {ratios}.", ""]
    picture = f"![memory and FLOPs against resolution]({_relative(RECORD.with_suffix('.png'))})"
    return "\n".join([START, table(record), "", *(beside if layers else []), source, "", picture, END])


def _relative(path: Path) -> str:
    return os.path.relpath(path, REPOSITORY).replace(os.sep, "/")


def updated(readme: str, record: dict[str, Any]) -> str:
    """Return README.md with the block written anew.

    Raises:
        ValueError: a marker is missing.
    """
    if START not in readme or END not in readme:
        raise ValueError(f"bench.table3.readme: README.md must hold {START} and {END}")
    before, rest = readme.split(START, 1)
    return before + block(record) + rest.split(END, 1)[1]


def renew() -> str:
    """Write README.md's block anew, and say from what."""
    write_text(README, updated(README.read_text(encoding="utf-8"), read_json(RECORD)))
    return f"README.md: Table 3 from {_relative(RECORD)}"
