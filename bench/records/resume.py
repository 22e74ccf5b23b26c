"""Going on where a run ended: what earlier records of the same code on the same device need not be measured again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from .files import read_json
from .record import Measurement

Content = TypeVar("Content")

UNFINISHED = 75  # exit code of a command with --resume that did not reach everything; sysexits.h: try again later
NOT_REACHED = ("not run:", "--deadline:")  # how the reasons of rows begin whose turn never came
VERSIONS = ("torch", "triton", "transformers")


def identity(environment: dict[str, Any]) -> dict[str, Any] | None:
    """Return what must be the same for a run to go on: device, commit and versions.

    Args:
        environment: of :func:`bench.records.environment.describe`.

    Returns:
        None where the commit is unknown or the files differ from it: nobody can tell then what was measured.
    """
    if not environment.get("commit") or environment.get("dirty") is not False:
        return None
    versions = environment.get("versions") or {}
    known = {name: versions.get(name) for name in VERSIONS}
    return {"device": environment.get("device"), "commit": environment["commit"], "versions": known}


def read_earlier(path: Path, parse: Callable[[Any], Content], empty: Content) -> Content:
    """Read what an earlier run wrote, to go on with it; where it can't be read, say so and begin with nothing.

    Args:
        path: of the file, which need not be there.
        parse: makes of the file's content what is wanted; raises where it is something else.
        empty: what there is to begin with.
    """
    if not path.exists():
        return empty
    try:
        return parse(read_json(path))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        print(f"starts again: {path} can't be read: {type(error).__name__}: {error}", flush=True)
        return empty


def is_same_run(earlier: dict[str, Any], now: dict[str, Any]) -> bool:
    """Tell whether what was measured in one environment stands in another."""
    mine = identity(now)
    return mine is not None and identity(earlier) == mine


def was_reached(record: Measurement) -> bool:
    """Tell whether a row says something of its provider, and not only that the time was over."""
    return not (record.status == "unavailable" and (record.reason or "").startswith(NOT_REACHED))


def standing(records: Iterable[Measurement], environment: dict[str, Any]) -> list[Measurement]:
    """List the rows of the same code on the same device that say something of their provider."""
    same: dict[int, bool] = {}  # records of one run share an environment
    found = []
    for record in records:
        own = id(record.environment)
        if own not in same:
            same[own] = is_same_run(record.environment, environment)
        if same[own] and was_reached(record):
            found.append(record)
    return found
