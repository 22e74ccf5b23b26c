"""The verdict that two revisions' times give on a case."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

VERDICTS = ("slower", "faster", "same", "noisy", "not compared")
HEADER = (
    f"{'case':<22} {'base ms':>10} {'now ms':>10} {'now/base':>9} {'p20 - p80':>13} {'rounds':>6}  "
    f"{'verdict':<12} ratios of all pairs"
)


@dataclass
class Row:
    """A case's times in one pair of processes or several.

    Attributes:
        case: of :func:`bench.compare.regression.cases`.
        base_ms: BASE's milliseconds: one list a pair of processes, one number a round.
        now_ms: likewise, the working tree's.
        problem: why it can't be compared; None if it can.
    """

    case: str
    base_ms: list[list[float]] = field(default_factory=list)
    now_ms: list[list[float]] = field(default_factory=list)
    problem: str | None = None

    def ratios(self, pair: int) -> list[float]:
        """Return now over base, round by round, of one pair of processes."""
        return [now / base for base, now in zip(self.base_ms[pair], self.now_ms[pair], strict=True)]

    @property
    def medians(self) -> list[float]:
        """Return the median of the paired ratios, of two in the middle the lower, one for each pair of processes."""
        return [statistics.median_low(self.ratios(pair)) for pair in range(len(self.base_ms))]

    @property
    def deciding(self) -> int:
        """Return the number of the pair that decides: the one with the median of the pairs' medians.

        Where a process's memory happens to lie can cost more than 10 % all its life: of three pairs of processes
        one such is outvoted.
        """
        medians = self.medians
        return medians.index(statistics.median_low(medians))

    @property
    def ratio(self) -> float:
        """Return the deciding pair's median."""
        return self.medians[self.deciding]

    def verdict(self, threshold: float) -> str:
        """Return one of :data:`VERDICTS`; the rule is ``bench compare --help``'s."""
        if self.problem is not None:
            return "not compared"
        if 1 / (1 + threshold) <= self.ratio <= 1 + threshold:
            return "same"
        word = "slower" if self.ratio > 1 else "faster"
        contradicted = any((median > 1) != (self.ratio > 1) for median in self.medians)
        return "noisy" if contradicted else word

    def line(self, threshold: float) -> str:
        """Return a row of the table.

        The times are of the deciding pair's median round, so the ratio is theirs; on a noisy machine, medians of their
        own would contradict it.
        """
        verdict = self.verdict(threshold)
        if self.problem is not None:
            return f"{self.case:<22} {verdict}: {self.problem}"
        pair, ratios = self.deciding, self.ratios(self.deciding)
        middle = ratios.index(statistics.median_low(ratios))
        base, now = self.base_ms[pair][middle], self.now_ms[pair][middle]
        cuts = statistics.quantiles(ratios, n=5, method="inclusive") if len(ratios) > 1 else [self.ratio] * 4
        spread, all_pairs = f"{cuts[0]:.2f} - {cuts[3]:.2f}", " ".join(f"{median:.3f}" for median in self.medians)
        return (
            f"{self.case:<22} {base:10.4f} {now:10.4f} {self.ratio:9.3f} {spread:>13} {len(ratios):6}  "
            f"{verdict:<12} {all_pairs}"
        )

    def to_dict(self, threshold: float) -> dict[str, Any]:
        """Return it JSON-ready."""
        times = {"base_ms": self.base_ms, "now_ms": self.now_ms}
        ratio = None if self.problem is not None else self.ratio
        return {"case": self.case, "verdict": self.verdict(threshold), "ratio": ratio, "problem": self.problem, **times}
