"""A device's records, and what changed since the ones before."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records.environment import REPOSITORY, commit_of, git_or_none, without_folders
from ..records.files import read_json
from ..records.record import Measurement, read_records

FILES = ("kernels.json", "end_to_end.json")
TARGETS, TABLE3 = "targets.json", "table3.json"
VERDICT = ("name", "kind", "where", "target", "ratio", "verdict", "note")  # of bench.targets
CHANGED = 0.05  # a median that moved less counts as unchanged
SIDE = re.compile(r"(?<![0-9a-z])(?:px)?(\d{3,4})(?:px)?(?=[-:]|$)")


@dataclass(frozen=True)
class Change:
    """One measurement against the previous record.

    Attributes:
        now: the measurement.
        before_ms: the previous median.
        certain: the ranges from p20 to p80 of the two don't overlap, and neither is noisy.
    """

    now: Measurement
    before_ms: float
    certain: bool

    @property
    def ratio(self) -> float:
        """Return now over before: above 1 is slower."""
        return (self.now.p50_ms or 0.0) / self.before_ms

    @property
    def verdict(self) -> str:
        """Return "slower", "faster" or "unchanged"."""
        if self.ratio > 1 + CHANGED:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + CHANGED) else "unchanged"


@dataclass
class Results:
    """A device's records.

    Attributes:
        slug: its folder's name.
        records: of kernels.json and end_to_end.json.
        table3: of table3.json; None where there is none.
        targets: verdicts of targets.json, and
        target_records: what they were made from.
        changes: against the previous record.
        previous: what that is, in words.
    """

    slug: str
    records: list[Measurement] = field(default_factory=list)
    table3: dict[str, Any] | None = None
    targets: list[dict[str, Any]] = field(default_factory=list)
    target_records: list[Measurement] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    previous: str = "nothing: there is no previous record"

    @property
    def device(self) -> str:
        """Return the device's name."""
        environments = [record.environment for record in self.every]
        if self.table3 is not None:
            environments.append(self.table3.get("environment", {}))
        return next((str(e["device"]) for e in environments if e.get("device")), self.slug)

    @property
    def every(self) -> list[Measurement]:
        """List all records."""
        return [*self.records, *self.target_records]

    @property
    def measured(self) -> list[Measurement]:
        """List all records, of a workload that was measured for the targets those alone: providers took turns there."""
        own = {_workload_of(record) for record in self.target_records if record.status == "ok"}
        return [*self.target_records, *(record for record in self.records if _workload_of(record) not in own)]


def _workload_of(record: Measurement) -> tuple[str, ...]:
    return record.op, record.case, record.mode, record.dtype


def load(folder: Path) -> Results:
    """Read a device's folder.

    Raises:
        ValueError: a file that isn't one of ours.
    """
    results = Results(folder.name)
    for name in FILES:
        if (folder / name).exists():
            results.records += read_records(folder / name)
    results.table3 = _object(folder / TABLE3)
    if (folder / TARGETS).exists():
        results.target_records = read_records(folder / TARGETS)
        results.targets = _verdicts(folder / TARGETS)
    return results


def _verdicts(path: Path) -> list[dict[str, Any]]:
    """Read the verdicts beside a file's records; none in a file that another command wrote.

    Raises:
        ValueError: one without what the tables show.
    """
    found = (_object(path) or {}).get("targets", [])
    for one in found if isinstance(found, list) else [found]:
        missing = [name for name in VERDICT if not isinstance(one, dict) or name not in one]
        if missing:
            raise ValueError(f"each of {path}'s targets must have {', '.join(VERDICT)}, got no {', '.join(missing)}")
    return list(found)


def _object(path: Path) -> dict[str, Any] | None:
    found = read_json(path) if path.exists() else None
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON file with an object, got {type(found).__name__}")
    return found


def side_of(record: Measurement) -> int | None:
    """Return the images' side in pixels, where the case names one."""
    if isinstance(record.extra.get("resolution"), int):
        return int(record.extra["resolution"])
    found = SIDE.search(record.case)
    return int(found.group(1)) if found else None


def family_of(record: Measurement) -> str:
    """Return the case without its images' side: what a curve against resolution has in common."""
    return SIDE.sub("*", record.case, count=1)


def total_bytes(record: Measurement) -> int | None:
    """Return the peak memory: of the whole model where it was a whole model, else of the call."""
    total = record.extra.get("total_bytes")
    return int(total) if isinstance(total, int) else record.peak_bytes


def sources(records: Iterable[Measurement]) -> list[str]:
    """List the commands, devices and commits behind some records, a line each."""
    return list(dict.fromkeys(source_line(record.environment) for record in records))


def command_of(environment: dict[str, Any]) -> str:
    """Return the command of a run, without its folders."""
    return without_folders(str(environment.get("command", "unknown command")))


def source_line(environment: dict[str, Any]) -> str:
    """Name command, device, commit and date of one run."""
    command, device = command_of(environment), environment.get("device", "an unknown device")
    threads, date = environment.get("threads", "?"), str(environment.get("date", ""))[:10]
    return f"{command} · {device}, {threads} threads · {commit_of(environment)} · {date}"


def compare(now: Iterable[Measurement], before: Iterable[Measurement]) -> list[Change]:
    """Compare the measurements that both have; the slowest change comes first."""
    old = {record.key: record for record in before if record.status == "ok" and record.p50_ms}
    changes = []
    for record in now:
        earlier = old.get(record.key)
        if record.status != "ok" or not record.p50_ms or earlier is None or not earlier.p50_ms:
            continue
        apart = (record.p20_ms or 0) > (earlier.p80_ms or 0) or (record.p80_ms or 0) < (earlier.p20_ms or 0)
        changes.append(Change(record, earlier.p50_ms, apart and not record.noisy and not earlier.noisy))
    return sorted(changes, key=lambda change: -change.ratio)


def previous_records(path: Path, revision: str | None, root: Path = REPOSITORY) -> tuple[list[Measurement], str]:
    """Read a file's records before its last change, from git.

    Args:
        path: of the records now.
        revision: whose version to take; None takes the last committed one that differs.
        root: of the repository.

    Returns:
        The records, none where there were none; and what they are of, in words.

    Raises:
        ValueError: no such revision, or the file can't be read.
    """
    try:
        name = path.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        return [], "nothing: the records are not in the repository"
    log = git_or_none("log", "-n", "20", "--format=%H", "--", name, root=root)
    wanted = [revision] if revision else (log or "").split()
    now = read_records(path)
    if revision and git_or_none("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", root=root) is None:
        raise ValueError(f"--previous: must be a revision of this repository, got {revision!r}")
    for commit in wanted:
        text = git_or_none("show", f"{commit}:{name}", root=root)
        if text is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            old = Path(folder) / path.name
            old.write_text(text, encoding="utf-8")
            found = read_records(old)
        if revision or found != now:  # what was only written in another form is no other record
            return found, f"{name} of {commit_of({'commit': commit})}"
    return [], f"nothing: {name} is new since {revision}" if revision else "nothing: there is no previous record"


def add_changes(results: Results, folder: Path, revision: str | None, root: Path = REPOSITORY) -> None:
    """Fill in what changed since the previous record of every file."""
    origins, before = [], []
    for name in FILES:
        if (folder / name).exists():
            records, origin = previous_records(folder / name, revision, root)
            before += records
            origins.append((bool(records), origin))
    results.changes = compare(results.records, before)
    # a file that is new has nothing to say beside one that has a past
    known = [origin for found, origin in origins if found] or [origin for _, origin in origins]
    if known:
        results.previous = ", ".join(dict.fromkeys(known))
