"""The records of a run: of what was timed, of what wasn't and why, and as lines of the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ..measure.roofline import Limits
from ..measure.timing import Samples
from ..records.record import Measurement
from .plan import Options
from .subjects import Case, Setting, Subject, flops, resolution_seen

WITHOUT_ROOFLINE = ("train_step", "second_question")  # their FLOPs are in no formula


@dataclasses.dataclass(frozen=True)
class Rows:
    """Makes the records of a run.

    Attributes:
        options: of the run.
        setting: of its models.
        limits: of the device.
        environment: that every record carries.
    """

    options: Options
    setting: Setting
    limits: Limits
    environment: dict[str, Any]

    @property
    def asked(self) -> dict[str, Any]:
        """Return what a row means beside its key: the same case measured otherwise is another row."""
        options = self.options
        return {
            "host": self.setting.spec.name,
            "attention": self.setting.attention,
            "pictures": self.setting.source.kind,
            "text_tokens": options.text_tokens,
            "new_tokens": options.new_tokens,
            "repeats": options.repeats,
            "budget_s": options.budget,
        }

    def timed(self, case: Case, subject: Subject, times: list[float], peak: int | None) -> Measurement:
        """Make a row of repetitions; where what it needs can't be told, a failure."""
        try:
            return self._timed(case, subject, times, peak)
        except Exception as error:
            return self.failed(case, subject.provider, error)

    def _timed(self, case: Case, subject: Subject, times: list[float], peak: int | None) -> Measurement:
        samples = Samples(times)
        p20, p50, p80 = (samples.percentile(percent) for percent in (20, 50, 80))
        own, moved = subject.own_bytes(), subject.least_bytes()
        counted = flops(subject.provider, self.setting, case)
        roofline = None
        if case.op not in WITHOUT_ROOFLINE:
            roofline = self.limits.roofline_ms(counted or 0, moved, self.options.dtype)
        extra: dict[str, Any] = {"prompt_tokens": subject.tokens, "model_bytes": own}
        extra["total_bytes"] = None if peak is None else own + peak
        if case.op == "decode":
            extra["tokens_per_s"] = case.batch / p50 * 1e3
        if case.op == "train_step":
            extra["trained_parameters"] = sum(parameter.numel() for parameter in subject.trained())
            extra["checkpointing"] = self.setting.checkpointing
        row = self._row(case, subject.provider, "ok", extra)
        return dataclasses.replace(
            row,
            p20_ms=p20,
            p50_ms=p50,
            p80_ms=p80,
            noisy=samples.noisy,
            repeats=len(times),
            flops=counted,
            bytes=moved,
            roofline_ms=roofline,
            percent_of_roofline=None if roofline is None else 100 * roofline / p50,
            peak_bytes=peak,
        )

    def with_peak(self, row: Measurement, peak: int | None) -> Measurement:
        """Return the row with a peak that was measured later."""
        total = None if peak is None else row.extra["model_bytes"] + peak
        return dataclasses.replace(row, peak_bytes=peak, extra=row.extra | {"total_bytes": total})

    def unavailable(self, case: Case, provider: str, reason: str) -> Measurement:
        """Make a row without a number."""
        return self._row(case, provider, "unavailable", {}, reason)

    def failed(self, case: Case, provider: str, error: Exception) -> Measurement:
        """Make a row of an error."""
        reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else describe_error(error)
        return self._row(case, provider, "failed", {}, reason)

    def _row(
        self, case: Case, provider: str, status: str, extra: dict[str, Any], reason: str | None = None
    ) -> Measurement:
        shared = self.asked | {
            "resolution": case.resolution,
            "batch": case.batch,
            "images": case.images,
            "resolution_seen": resolution_seen(provider, case.resolution),
        }
        names = ("end_to_end", case.op, case.name, provider, case.mode, self.options.dtype, self.options.device)
        times = {"p20_ms": 0.0, "p50_ms": 0.0, "p80_ms": 0.0} if status == "ok" else {}
        return Measurement(*names, status, reason, **times, extra=shared | extra, environment=self.environment)


def describe_error(error: Exception) -> str:
    """Return the kind of error and its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0] or 'no message'}"[:400]


def line_of(record: Measurement, records: Sequence[Measurement]) -> str:
    """Return a record as a line of the terminal; times beside ours where ours is known."""
    if record.status != "ok" or record.p50_ms is None:
        return f"{record.provider:<9} {record.status}: {record.reason}"
    line = f"{record.provider:<9} {record.p50_ms:10.1f} ms"
    total = record.extra.get("total_bytes")
    line += "" if total is None else f"  {total / 1e9:6.2f} GB"
    if record.op == "decode":
        line += f"  {record.extra['tokens_per_s']:.1f} tokens/s"
    ours = next((r for r in records if r.provider == "hia" and (r.op, r.case) == (record.op, record.case)), None)
    if ours is not None and ours is not record and ours.p50_ms:
        line += f"  {record.p50_ms / ours.p50_ms:.2f} x hia"
    return line + ("  noisy" if record.noisy else "")
