"""Speedups of ours over its peers: the only place that computes and judges them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..records.record import Measurement

OURS = "hia"
OWN = ("textbook",)  # our ops in the maths as it is written down; hia-<backend> are ours too
EVEN = 0.05  # a ratio nearer to 1 is within what runs differ by


def is_peer(record: Measurement) -> bool:
    """Tell whether a row is somebody else's way to the same result.

    A limit computes nothing, and a model that shrinks its images reads others.
    """
    own = record.provider == OURS or record.provider.startswith(f"{OURS}-") or record.provider in OWN
    side = record.extra.get("resolution")
    shrinks = record.extra.get("resolution_seen", side) != side
    return not (own or shrinks or record.extra.get("limit"))


def verdict_of(ratio: float) -> str:
    """Return "faster", "slower", or "even": of ours, by the others' time over ours."""
    if ratio > 1 + EVEN:
        return "faster"
    return "slower" if ratio < 1 / (1 + EVEN) else "even"


@dataclass(frozen=True)
class Speedup:
    """Ours beside its peers in one op and mode.

    Attributes:
        level: of the op.
        op: its name.
        mode: forward, backward, both or dispatch.
        dtype: of the inputs.
        cases: in which ours and a peer have a time.
        ratio: of the fastest peer's time in each case over ours, the geometric mean.
        fastest: that peer's name, the most frequent first.
        slower: cases in which a peer is faster.
        against: for each peer the geometric mean of its time over ours, and the cases behind it.
        beside: the same for what is no peer: our own backends, and models that shrink their images.
        percent_of_roofline: of ours, the median over the cases; None where no case has one.
    """

    level: str
    op: str
    mode: str
    dtype: str
    cases: int
    ratio: float
    fastest: tuple[str, ...]
    slower: tuple[str, ...]
    against: dict[str, tuple[float, int]]
    beside: dict[str, tuple[float, int]]
    percent_of_roofline: float | None

    @property
    def verdict(self) -> str:
        """Return "faster", "slower" or "even"."""
        return verdict_of(self.ratio)


def speedups(records: Iterable[Measurement]) -> list[Speedup]:
    """Compare ours with the others: one line an op, mode and dtype, in the records' order."""
    groups: dict[tuple[str, str, str, str], dict[str, dict[str, Measurement]]] = {}
    for record in records:
        if record.status == "ok" and record.p50_ms and not record.extra.get("limit"):
            key = (record.level, record.op, record.mode, record.dtype)
            groups.setdefault(key, {}).setdefault(record.case, {})[record.provider] = record
    found = [_speedup(key, cases) for key, cases in groups.items()]
    return [one for one in found if one is not None]


def _speedup(key: tuple[str, str, str, str], cases: dict[str, dict[str, Measurement]]) -> Speedup | None:
    against: dict[str, list[float]] = {}
    beside: dict[str, list[float]] = {}
    best: dict[str, float] = {}
    fastest: Counter[str] = Counter()
    roofline = []
    for case, rows in cases.items():
        ours, peers = rows.get(OURS), [row for row in rows.values() if is_peer(row)]
        if ours is None or not peers:
            continue
        for row in rows.values():
            if row is not ours:
                (against if is_peer(row) else beside).setdefault(row.provider, []).append(_ratio(row, ours))
        peer = min(peers, key=lambda row: row.p50_ms or 0.0)
        best[case] = _ratio(peer, ours)
        fastest[peer.provider] += 1
        if ours.percent_of_roofline is not None:
            roofline.append(ours.percent_of_roofline)
    if not best:
        return None
    return Speedup(
        *key,
        cases=len(best),
        ratio=statistics.geometric_mean(best.values()),
        fastest=tuple(name for name, _ in fastest.most_common()),
        slower=tuple(case for case, ratio in best.items() if ratio < 1),
        against=_means(against),
        beside=_means(beside),
        percent_of_roofline=statistics.median(roofline) if roofline else None,
    )


def _means(ratios: dict[str, list[float]]) -> dict[str, tuple[float, int]]:
    return {name: (statistics.geometric_mean(values), len(values)) for name, values in ratios.items()}


def _ratio(other: Measurement, ours: Measurement) -> float:
    return (other.p50_ms or 0.0) / (ours.p50_ms or 1.0)


def beside_limits(records: Iterable[Measurement]) -> list[tuple[Measurement, Measurement]]:
    """Pair ours with the limit of the same workload, where it has one."""
    ok = [record for record in records if record.status == "ok" and record.p50_ms]
    ours = {(r.op, r.case, r.mode, r.dtype): r for r in ok if r.provider == OURS}
    limits = [record for record in ok if record.extra.get("limit")]
    keys = [(record.op, record.case, record.mode, record.dtype) for record in limits]
    return [(ours[key], limit) for key, limit in zip(keys, limits, strict=True) if key in ours]


def furthest_from_roofline(records: Sequence[Measurement], count: int = 10) -> list[Measurement]:
    """Return the rows of ours with the least percentage of the roofline."""
    known = [r for r in records if r.provider == OURS and r.status == "ok" and r.percent_of_roofline is not None]
    return sorted(known, key=lambda record: record.percent_of_roofline or 0.0)[:count]
