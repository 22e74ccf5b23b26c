"""``python -m bench report``: records to Markdown, pictures and one self-contained HTML page. It measures nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..cli import BadOption, one_place, some_of
from ..records.environment import REPOSITORY
from ..records.files import OUT, RESULTS, shown, write_text

if TYPE_CHECKING:
    from .data import Results

DOCS = REPOSITORY / "docs" / "benchmarks"


def report(
    results: Annotated[
        Path,
        typer.Option(
            "--results", metavar="DIR", help="Folder of the devices' folders: `out` holds the runs without --record."
        ),
    ] = RESULTS,
    device: Annotated[
        list[str] | None, typer.Option("--device", metavar="NAME", help="Folders of these devices, not all.")
    ] = None,
    previous: Annotated[
        str | None,
        typer.Option(
            "--previous", metavar="REV", help="Compare with this revision's records, not with the last that differ."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Where the report goes, instead of `out/report`.", callback=one_place
        ),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Renew docs/benchmarks, which is committed.", callback=one_place)
    ] = False,
) -> int:
    """Markdown, pictures and one HTML page from the records; nothing is measured."""
    folders = find_folders(results, device)
    from .data import add_changes, load

    devices = []
    try:
        for folder in folders:
            devices.append(load(folder))
            add_changes(devices[-1], folder, previous)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"bench report: {error}\n")
        return 2
    written = write_all(devices, DOCS if record else out or OUT / "report")
    for one in devices:
        print(summary(one))
    print(f"written: {', '.join(map(shown, written))}")
    return 0


def find_folders(results: Path, wanted: list[str] | None) -> list[Path]:
    """Return the devices' folders.

    Raises:
        BadOption: none, or another name than theirs.
    """
    from .data import FILES, TABLE3, TARGETS

    records = (*FILES, TARGETS, TABLE3)
    found = {path.name: path for path in sorted(results.glob("*")) if any((path / name).exists() for name in records)}
    if not found:
        raise BadOption(
            f"--results: must hold a device's folder with records, got none in {results}; run `make bench`, and name "
            f"its folder: `--results out`"
        )
    return [found[name] for name in (some_of("--device", wanted, found) if wanted else found)]


def write_all(devices: list[Results], out: Path) -> list[Path]:
    """Write index.html, and for each device a page and, with matplotlib, its pictures.

    Returns:
        The files written.
    """
    from ..plotting import unavailable
    from . import html, markdown, sections

    written = []
    reason = unavailable()
    if reason is not None:
        print(f"no pictures: {reason}", file=sys.stderr)
    made = [(results, sections.report(results)) for results in devices]
    for results, parts in made:
        written += markdown.pictures(results, parts, out)
        written.append(write_text(out / f"{results.slug}.md", markdown.page(results, parts)))
    written.append(write_text(out / "index.html", html.render(made)))
    return written


def summary(results: Results) -> str:
    """Say in one line what a device has; wins and regressions are counted side by side."""
    verdicts = [change.verdict for change in results.changes]
    failed = sum(record.status == "failed" for record in results.records)
    moved = f"{verdicts.count('slower')} slower, {verdicts.count('faster')} faster than {results.previous}"
    return f"{results.device}: {len(results.records)} measurements, {failed} failed; {moved}"
