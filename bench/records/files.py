"""Files written whole or not at all, and the folders that results go to."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .environment import REPOSITORY, slug

OUT = REPOSITORY / "out"  # git ignores it
RESULTS = REPOSITORY / "bench" / "results"


class BadFile(ValueError):
    """A file that a command needs and that holds something else. Exit code 2."""


def results_folder(device: str, *, out: Path | None = None, record: bool = False) -> Path:
    """Return the folder of a device's results.

    Args:
        device: its name.
        out: what ``--out`` says; stronger than the rest.
        record: the committed folder, as ``--record`` asks for.
    """
    return out if out is not None else (RESULTS if record else OUT) / slug(device)


def shown(path: Path) -> str:
    """Return a path as it reads shortest: from the working directory, unless it lies elsewhere."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file beside ``path`` that takes its place at the end of the block: a reader sees the old one or the new.

    A block that raises leaves ``path`` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)  # mkstemp's files are the owner's alone
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Replace a file's text."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    """Replace a file by a value as JSON."""
    return write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        BadFile: it holds something else; names the file.
        OSError: unreadable.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadFile(f"{path} must be a JSON file, got: {error}") from error
