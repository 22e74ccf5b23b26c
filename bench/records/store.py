"""Files of records, kept up to date while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .files import BadFile
from .record import Measurement, read_records, write_records


def earlier_records(path: Path) -> list[Measurement]:
    """Read what a file holds that a run will add to; nothing where there is none.

    Raises:
        BadFile: it holds something else.
    """
    try:
        return read_records(path) if path.exists() else []
    except (ValueError, OSError) as error:
        raise BadFile(
            f"--out: {path} must hold the records of an earlier run, got: {error}; move it away, or name another folder"
        ) from error


def merged(kept: Sequence[Measurement], records: Sequence[Measurement]) -> list[Measurement]:
    """Return what was found now, and of before what wasn't; that something could not run now replaces no number."""
    numbers = {record.key for record in kept if record.status != "unavailable"}
    new = [record for record in records if record.status != "unavailable" or record.key not in numbers]
    replaced = {record.key for record in new}
    return [record for record in kept if record.key not in replaced] + new


class Store:
    """The files of a run.

    Args:
        paths: of them.
        own: those that are the run's alone; the others keep what they held and the run has no row for, until a complete
            run ends.
        beside: what else a file holds, made from its records.

    Raises:
        BadFile: a file that is added to holds something else.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        own: Sequence[Path] = (),
        beside: Callable[[list[Measurement]], dict[str, Any]] = lambda _: {},
    ) -> None:
        self.paths, self._beside = list(paths), beside
        self._kept = {path: [] if path in own else earlier_records(path) for path in self.paths}

    def save(self, records: Sequence[Measurement], *, complete: bool = False) -> None:
        """Write everything measured so far to every file; nothing replaces no record.

        Args:
            records: of the run.
            complete: it was asked for everything, and came to its end.
        """
        for path in self.paths if records else []:
            found = merged([] if complete else self._kept[path], records)
            write_records(path, found, **self._beside(found))

    def all(self, records: Sequence[Measurement]) -> list[Measurement]:
        """Return what the first file holds after :meth:`save`; the run's records where there is no file."""
        return merged(self._kept[self.paths[0]] if self.paths else [], records)
