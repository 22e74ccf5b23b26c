"""The calls that the workers run: one run of the protocol, or what several runs share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..records.files import write_json
from .protocol import Protocol, Row
from .train import Material, run


def say(start: float, who: str, text: str) -> None:
    """Print a line of progress with the minutes since ``start``."""
    print(f"[{(time.monotonic() - start) / 60:5.1f} min] {who}: {text}", flush=True)


def run_row(
    protocol: Protocol, cache: Path, row: Row, seed: int, environment: dict[str, Any], start: float, place: Path
) -> None:
    """Run one row with one seed; the result is on disk as soon as it is there."""
    result = run(Material(protocol, cache), row, seed, lambda text: say(start, f"{row.name} {seed}", text))
    write_json(place, {**result, "environment": environment})


def make(protocol: Protocol, cache: Path, what: str, arguments: tuple[Any, ...], start: float) -> None:
    """Make one thing that runs share."""
    getattr(Material(protocol, cache), what)(*arguments, lambda text: say(start, "prepare", text))
