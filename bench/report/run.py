"""Records -> Markdown, PNG and one self-contained HTML page: ``python -m bench report``.

Reads ``bench/results/<device>/{kernels,end_to_end,table3,targets}.json`` and measures nothing.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from pathlib import Path

from ..records.environment import REPOSITORY
from ..table3.output import write_file
from ..table3.plot import plotting_unavailable
from .data import Results, add_changes, load
from .html import render
from .markdown import page, targets_page

DEFAULT_RESULTS = REPOSITORY / "bench" / "results"
DEFAULT_OUT = REPOSITORY / "docs" / "benchmarks"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parsed flags.

    Raises:
        SystemExit: a value that isn't allowed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench report", description="Markdown, pictures and one HTML page from the recorded benchmarks."
    )
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        default=DEFAULT_RESULTS,
        help="folder of the devices' folders (default: bench/results)",
    )
    parser.add_argument("--device", nargs="+", metavar="NAME", help="folders of these devices (default: all)")
    parser.add_argument(
        "--previous",
        metavar="REV",
        help="compare with this revision's records (default: the last committed ones that differ)",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=DEFAULT_OUT, help="where the report goes (default: docs/benchmarks)"
    )
    options = parser.parse_args(arguments)
    try:
        options.folders = find_folders(options.results, options.device)
    except ValueError as error:
        parser.error(str(error))
    return options


def find_folders(results: Path, wanted: list[str] | None) -> list[Path]:
    """The devices' folders.

    Raises:
        ValueError: none, or another name than theirs.
    """
    found = {path.name: path for path in sorted(results.glob("*")) if any(path.glob("*.json"))}
    if not found:
        raise ValueError(f"--results: must hold a device's folder with records, got none in {results}; run make bench")
    for name in wanted or ():
        if name not in found:
            near = difflib.get_close_matches(name, list(found), n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--device: must be among {', '.join(found)}, got {name!r}{hint}")
    return [found[name] for name in wanted or found]


def write_text(path: Path, text: str) -> Path:
    """Through a temporary file, so that a reader sees the old text or the new one."""
    write_file(path, lambda target: target.write_text(text, encoding="utf-8") and None)
    return path


def write_all(devices: list[Results], out: Path) -> list[Path]:
    """index.html, and for each device a page and, with matplotlib, its pictures.

    Returns:
        The files written.
    """
    written = []
    reason = plotting_unavailable()
    if reason is not None:
        print(f"no pictures: {reason}", file=sys.stderr)
    for results in devices:
        pictures: list[str] = []
        out.mkdir(parents=True, exist_ok=True)
        if reason is None:
            from .plots import draw_all

            pictures = draw_all(results.records, out, results.slug)
            written += [out / name for name in pictures]
        written.append(write_text(out / f"{results.slug}.md", page(results, pictures)))
        if results.targets:
            written.append(write_text(out / f"targets-{results.slug}.md", targets_page(results)))
    written.append(write_text(out / "index.html", render(devices)))
    return written


def summary(results: Results) -> str:
    """A device's records in one line; wins and regressions are counted side by side."""
    verdicts = [change.verdict for change in results.changes]
    failed = sum(record.status == "failed" for record in results.records)
    moved = f"{verdicts.count('slower')} slower, {verdicts.count('faster')} faster than {results.previous}"
    return f"{results.device}: {len(results.records)} measurements, {failed} failed; {moved}"


def main(arguments: list[str] | None = None) -> int:
    """Read, write.

    Returns:
        0; 2 where a file can't be read.
    """
    options = parse(arguments)
    devices = []
    try:
        for folder in options.folders:
            results = load(folder)
            add_changes(results, folder, options.previous)
            devices.append(results)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    written = write_all(devices, options.out)
    for results in devices:
        print(summary(results))
    print(f"written: {', '.join(os.path.relpath(path) for path in written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
