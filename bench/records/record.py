"""One measurement of one provider: what ``bench.ops`` and ``bench.end_to_end`` write and ``bench.report`` reads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .devices import DEVICES
from .files import read_json, write_json

LEVELS = ("op", "composite", "end_to_end")
MODES = ("forward", "backward", "both", "dispatch")
STATUSES = ("ok", "failed", "unavailable")
FORMAT = 1
RENAMED = {"floor_ms": "roofline_ms", "percent_of_floor": "percent_of_roofline"}  # fields of earlier revisions' records

_CHOICES = {"level": LEVELS, "mode": MODES, "device": DEVICES, "status": STATUSES}
_STRINGS = ("op", "case", "provider", "dtype")
_COUNTS = ("repeats", "flops", "bytes", "peak_bytes")
_TIMES = ("p20_ms", "p50_ms", "p80_ms")


@dataclass(frozen=True)
class Measurement:
    """One provider on one case, in one mode.

    Attributes:
        level: "op", "composite" or "end_to_end".
        op: the op's or composite's name; for "end_to_end" the quantity, e.g. "time_to_first_token".
        case: a name of :mod:`bench.workloads`, with ":role" where an op has several in a case.
        provider: who computed it.
        mode: "forward", "backward", "both" (one after the other), or "dispatch": what the CPU does for one call
            of a tiny shape; on the device "cpu" its arithmetic is part of it.
        dtype: "fp32", "bf16" or "fp16".
        device: "cpu" or "cuda".
        status: "ok"; "failed": raised, or its output missed the tolerance; "unavailable": can't run here.
        reason: why it isn't "ok"; None if it is.
        p20_ms: 20th percentile of the repetitions, milliseconds; None unless "ok".
        p50_ms: the median.
        p80_ms: 80th percentile.
        noisy: the medians of the two halves of the repetitions differ by more than 15 %.
        repeats: timed repetitions.
        flops: of the mathematics, 2 a multiply-add, whatever the provider does; None if unknown.
        bytes: what must at least move: inputs read and outputs written once; None if unknown.
        roofline_ms: max(bytes / bandwidth, FLOPs / rate) by the device's limits measured in the same run.
        percent_of_roofline: 100 * roofline_ms / p50_ms; 100 is the limit. Above it, data stayed in a cache.
        peak_bytes: allocated during one call above what was allocated before it; None if unknown.
        extra: anything else, e.g. "tokens_per_s", "backend" or "error" (relative RMS).
        environment: of :func:`bench.records.environment.describe`.
    """

    level: str
    op: str
    case: str
    provider: str
    mode: str
    dtype: str
    device: str
    status: str
    reason: str | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    noisy: bool = False
    repeats: int = 0
    flops: int | None = None
    bytes: int | None = None
    roofline_ms: float | None = None
    percent_of_roofline: float | None = None
    peak_bytes: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"Measurement: {name} must be {' or '.join(choices)}, got {getattr(self, name)!r}")
        for name in _STRINGS:
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"Measurement: {name} must be a name, got {value!r}")
        for name in (*_TIMES, "roofline_ms", "percent_of_roofline"):
            _check_number(name, getattr(self, name), whole=False)
        for name in _COUNTS:
            _check_number(name, getattr(self, name), whole=True)
        for name in ("extra", "environment"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"Measurement: {name} must be a dict, got {getattr(self, name)!r}")
        self._check_status()

    def _check_status(self) -> None:
        times = [getattr(self, name) for name in _TIMES]
        if self.status == "ok":
            if None in times or self.reason is not None:
                raise ValueError(
                    f"Measurement: status 'ok' must have p20_ms, p50_ms, p80_ms and no reason, "
                    f"got {times}, {self.reason!r}"
                )
        elif any(time is not None for time in times) or not self.reason:
            raise ValueError(
                f"Measurement: status {self.status!r} must have a reason and no times, got {self.reason!r}, {times}"
            )

    @property
    def key(self) -> tuple[str, ...]:
        """Return what a measurement has in common with another run's: all that it is of, and none of its values."""
        return self.level, self.op, self.case, self.provider, self.mode, self.dtype, self.device

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measurement:
        """Make a measurement of what :meth:`to_dict` returned.

        Raises:
            ValueError: no dict, unknown or missing fields, or values that don't fit.
        """
        if not isinstance(values, dict):
            raise ValueError(f"Measurement: a record must be a JSON object, got {type(values).__name__}")
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(values) - set(known))
        missing = [name for name in known if name not in values]
        if unknown or missing:
            raise ValueError(f"Measurement: fields must be exactly {known}, got unknown {unknown}, missing {missing}")
        return cls(**values)


def _check_number(name: str, value: Any, *, whole: bool) -> None:
    if value is None and name != "repeats":
        return
    fits = isinstance(value, int) if whole else isinstance(value, int | float)
    if not fits or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"Measurement: {name} must be {kind} of at least 0, got {value!r}")


def write_records(path: str | Path, records: Iterable[Measurement], **beside: Any) -> Path:
    """Replace ``path`` by these records; a reader sees the old file or the new one, never half of it.

    Each environment is stored once, and records name it by its number.

    Args:
        path: of the file.
        records: all it will hold.
        beside: other JSON-ready values, stored under their names.
    """
    path = Path(path)
    environments: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for record in records:
        row = record.to_dict()
        if row["environment"] not in environments:
            environments.append(row["environment"])
        rows.append({**row, "environment": environments.index(row["environment"])})
    content = {"format": FORMAT, "environments": environments, "records": rows, **beside}
    return write_json(path, content)


def read_records(path: str | Path) -> list[Measurement]:
    """Read what :func:`write_records` wrote.

    Raises:
        ValueError: no such file's content; names the file and the record.
        OSError: unreadable.
    """
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"read_records: {path} must hold an object of format {FORMAT}, got {found!r}")
    environments, rows = content.get("environments"), content.get("records")
    if not isinstance(environments, list) or not isinstance(rows, list):
        raise ValueError(f"read_records: {path} must hold lists 'environments' and 'records', got {sorted(content)}")
    found = []
    for number, row in enumerate(rows):
        try:
            index = row["environment"]
            values = {RENAMED.get(name, name): value for name, value in row.items()}
            found.append(Measurement.from_dict({**values, "environment": environments[index]}))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"read_records: {path}, record {number}: {error}") from error
    return found
