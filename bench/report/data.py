"""What the report is made of: a device's records, how ours stand beside their peers, and what changed."""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records.environment import REPOSITORY
from ..records.record import Measurement, read_records

OURS = "hia"
FILES = ("kernels.json", "end_to_end.json")
VERDICT = ("name", "kind", "where", "target", "ratio", "verdict", "note")  # of a verdict of bench.targets
CHANGED = 0.05  # a median that moved less counts as unchanged
SIDE = re.compile(r"(?<![0-9a-z])(?:px)?(\d{3,4})(?:px)?(?=[-:]|$)")
SHORT = 10  # characters of a commit


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
        """Now over before: above 1 is slower."""
        return (self.now.p50_ms or 0.0) / self.before_ms

    @property
    def verdict(self) -> str:
        """ "slower", "faster" or "unchanged"."""
        if self.ratio > 1 + CHANGED:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + CHANGED) else "unchanged"


@dataclass(frozen=True)
class Standing:
    """Ours against the others in one op and mode.

    Attributes:
        level: of the op.
        op: its name.
        mode: forward, backward, both or dispatch.
        dtype: of the inputs.
        cases: in which ours and at least one other have a time.
        against: for each other provider the geometric mean of its time over ours, and the cases behind it.
        slower: cases in which some other provider is faster.
    """

    level: str
    op: str
    mode: str
    dtype: str
    cases: int
    against: dict[str, tuple[float, int]]
    slower: tuple[str, ...]


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
        """The device's name."""
        environments = [record.environment for record in (*self.records, *self.target_records)]
        if self.table3 is not None:
            environments.append(self.table3.get("environment", {}))
        return next((str(e["device"]) for e in environments if e.get("device")), self.slug)


def load(folder: Path) -> Results:
    """A device's folder.

    Raises:
        ValueError: a file that isn't one of ours.
    """
    results = Results(folder.name)
    for name in FILES:
        if (folder / name).exists():
            results.records += read_records(folder / name)
    results.table3 = _json(folder / "table3.json")
    path = folder / "targets.json"
    if path.exists():
        results.target_records = read_records(path)
        results.targets = _targets(path)
    return results


def _targets(path: Path) -> list[dict[str, Any]]:
    """The verdicts beside a file's records; none in a file that another command wrote.

    Raises:
        ValueError: one without what the tables show.
    """
    found = (_json(path) or {}).get("targets", [])
    for one in found if isinstance(found, list) else [found]:
        missing = [name for name in VERDICT if not isinstance(one, dict) or name not in one]
        if missing:
            raise ValueError(
                f"bench.report: each of {path}'s targets must have {', '.join(VERDICT)}, got no {', '.join(missing)}"
            )
    return list(found)


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"bench.report.run: {path} must be a JSON file with an object, got: {error}") from error


def side_of(record: Measurement) -> int | None:
    """The images' side in pixels, where the case names one."""
    if isinstance(record.extra.get("resolution"), int):
        return int(record.extra["resolution"])
    found = SIDE.search(record.case)
    return int(found.group(1)) if found else None


def family_of(record: Measurement) -> str:
    """The case without its images' side: what a curve against resolution has in common."""
    return SIDE.sub("*", record.case, count=1)


def total_bytes(record: Measurement) -> int | None:
    """Peak memory: of the whole model where it was a whole model, else of the call."""
    total = record.extra.get("total_bytes")
    return int(total) if isinstance(total, int) else record.peak_bytes


def compare(now: Iterable[Measurement], before: Iterable[Measurement]) -> list[Change]:
    """Measurements that both have, the slowest change first."""
    old = {record.key: record for record in before if record.status == "ok" and record.p50_ms}
    changes = []
    for record in now:
        earlier = old.get(record.key)
        if record.status != "ok" or not record.p50_ms or earlier is None or not earlier.p50_ms:
            continue
        apart = (record.p20_ms or 0) > (earlier.p80_ms or 0) or (record.p80_ms or 0) < (earlier.p20_ms or 0)
        changes.append(Change(record, earlier.p50_ms, apart and not record.noisy and not earlier.noisy))
    return sorted(changes, key=lambda change: -change.ratio)


def standings(records: Sequence[Measurement]) -> list[Standing]:
    """Ours against the others, one line an op, mode and dtype."""
    groups: dict[tuple[str, str, str, str], dict[str, dict[str, float]]] = {}
    for record in records:
        if record.status == "ok" and record.p50_ms and not record.extra.get("limit"):
            key = (record.level, record.op, record.mode, record.dtype)
            groups.setdefault(key, {}).setdefault(record.case, {})[record.provider] = record.p50_ms
    found = []
    for key, cases in groups.items():
        ratios: dict[str, list[float]] = {}
        slower, compared = [], 0
        for case, times in cases.items():
            others = {name: time for name, time in times.items() if name != OURS}
            if OURS not in times or not others:
                continue
            compared += 1
            for name, time in others.items():
                ratios.setdefault(name, []).append(time / times[OURS])
            if min(others.values()) < times[OURS]:
                slower.append(case)
        if compared:
            against = {name: (geometric_mean(values), len(values)) for name, values in ratios.items()}
            found.append(Standing(*key, compared, against, tuple(slower)))
    return found


def beside_limits(records: Iterable[Measurement]) -> list[tuple[Measurement, Measurement]]:
    """Ours and the limit of the same workload, where it has one."""
    ok = [record for record in records if record.status == "ok" and record.p50_ms]
    ours = {(r.op, r.case, r.mode, r.dtype): r for r in ok if r.provider == OURS}
    limits = [record for record in ok if record.extra.get("limit")]
    keys = [(record.op, record.case, record.mode, record.dtype) for record in limits]
    return [(ours[key], limit) for key, limit in zip(keys, limits, strict=True) if key in ours]


def note_of(record: Measurement) -> str:
    """Why there is no number, or what a reader must know of it."""
    limit = record.extra.get("limit")
    parts = (record.reason, f"limit: {limit}" if limit else "", "noisy" if record.noisy else "")
    return ", ".join(part for part in parts if part)


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def furthest_from_roofline(records: Iterable[Measurement], count: int = 10, provider: str = OURS) -> list[Measurement]:
    """The rows of ours with the least percentage of their roofline."""
    known = [r for r in records if r.provider == provider and r.status == "ok" and r.percent_of_roofline is not None]
    return sorted(known, key=lambda record: record.percent_of_roofline or 0.0)[:count]


def sources(records: Iterable[Measurement]) -> list[str]:
    """The commands, devices and commits behind some records, a line each."""
    lines: dict[str, None] = {}
    for record in records:
        lines.setdefault(source_line(record.environment), None)
    return list(lines)


def source_line(environment: dict[str, Any]) -> str:
    """Command, device, commit and date of one run."""
    commit = str(environment.get("commit") or "no commit")[:SHORT]
    dirty = " with uncommitted changes" if environment.get("dirty") else ""
    where = f"{environment.get('device', 'an unknown device')}, {environment.get('threads', '?')} threads"
    return (
        f"{environment.get('command', 'unknown command')} · {where} · {commit}{dirty} · {environment.get('date', '')}"
    )


def _git(*arguments: str, root: Path) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def previous_records(path: Path, revision: str | None, root: Path = REPOSITORY) -> tuple[list[Measurement], str]:
    """A file's records before its last change, from git, and where they came from.

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
    wanted = [revision] if revision else (_git("log", "-n", "20", "--format=%H", "--", name, root=root) or "").split()
    now = read_records(path)
    if revision and _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", root=root) is None:
        raise ValueError(f"--previous: must be a revision of this repository, got {revision!r}")
    for commit in wanted:
        text = _git("show", f"{commit}:{name}", root=root)
        if text is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            old = Path(folder) / path.name
            old.write_text(text, encoding="utf-8")
            found = read_records(old)
        if revision or found != now:  # what was only written in another form is no other record
            return found, f"{name} of {commit[:SHORT]}"
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
