"""The run of several tasks: who failed is left out and the rest goes on, and what was found is on disk at any time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..measure.roofline import Limits
from ..measure.worker import Failure, Inline, Isolated, Worker
from ..progress import Progress
from ..providers.registry import all_providers
from ..records.record import Measurement
from .entries import OVER
from .plan import Task
from .session import Session, Settings, row_of

OUR_PROVIDERS = ("hia", "textbook", "gemms", "reference")  # and hia-<backend>; without the reference none is checked


def is_ours(record: Measurement) -> bool:
    """Tell whether a row that failed is this project's failure, not a peer's."""
    return record.provider in OUR_PROVIDERS or record.provider.startswith("hia-")


@dataclass
class Collected:
    """A run's findings; the channel of its tasks.

    Attributes:
        environment: of the records.
        progress: told what is done.
        limits: of the device, once they are measured.
        not_begun: names of tasks whose turn never came.
        failures: of the device, of a process, or of a step that took too long.
    """

    environment: dict[str, Any]
    progress: Progress
    limits: Limits | None = None
    not_begun: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _rows: dict[tuple[str, ...], Measurement] = field(default_factory=dict)

    @property
    def records(self) -> list[Measurement]:
        """Return every row, once."""
        return list(self._rows.values())

    @property
    def over(self) -> bool:
        """Tell whether something's turn never came."""
        return bool(self.not_begun) or any(row.reason == OVER for row in self._rows.values())

    @property
    def cut(self) -> bool:
        """Tell whether something wasn't run because the run was over, or failed."""
        return self.over or bool(self.failures)

    def say(self, text: str, who: str = "", seconds: float | None = None) -> None:
        """Show what is being done."""
        self.progress.detail(text)

    def found(self, item: Limits | Measurement) -> None:
        """Keep the device's limits, or a row; of two rows of one measurement the later, unless it has no number."""
        if isinstance(item, Limits):
            self.limits = item
            self.environment = {**self.environment, "limits": item.to_dict()}
        elif item.status != "unavailable" or item.key not in self._rows:
            self._rows[item.key] = replace(item, environment=self.environment)

    def failed(self, task: Task, device: str, failure: Failure) -> None:
        """Add the rows of the provider that failed, one for each mode that it has none in: the first is the failure."""
        who = failure.who or "reference"
        reason = f"{failure.reason} in {who} {task.workload.op} {task.workload.name}"
        self.failures.append(reason)
        had = {row.mode for row in self._rows.values() if self._is_of(row, task, failure.who)}
        status, why = "failed", reason
        for mode in task.modes:
            if mode not in had:
                self.found(row_of(task, device, who, mode, status=status, reason=why))
                status, why = "unavailable", f"not run: {reason}"

    @staticmethod
    def _is_of(row: Measurement, task: Task, who: str) -> bool:
        """Tell whether a row is of the task, and of that provider, where one is named."""
        same = (row.op, row.case, row.dtype) == (task.workload.op, task.workload.name, task.dtype)
        return same and who in ("", row.provider)


def left_to_do(tasks: Sequence[Task], standing: Sequence[Measurement], device: str) -> list[Task]:
    """List what of some tasks has no row yet; what failed before comes last, or it would be in the way of the rest.

    Args:
        tasks: in order.
        standing: rows that need not be measured again, and those that failed.
        device: "cpu" or "cuda".
    """
    everyone = all_providers()
    known = {row.key for row in standing if row.status != "failed"}
    failed = {(row.op, row.case, row.dtype) for row in standing if row.status == "failed"}
    rest = []
    for task in tasks:
        who = [name for name in task.providers if everyone[name].serves(task.workload)]
        empty = {"status": "unavailable", "reason": OVER}
        modes = [
            mode for mode in task.modes if not {row_of(task, device, name, mode, **empty).key for name in who} <= known
        ]
        if modes:
            rest.append(replace(task, modes=tuple(modes)))
    return sorted(rest, key=lambda task: (task.workload.op, task.workload.name, task.dtype) in failed)


def run_tasks(tasks: Sequence[Task], settings: Settings, into: Collected, save: Callable[[], None]) -> None:
    """Run tasks until the run is over; on CUDA in a process of their own.

    Args:
        tasks: in order.
        settings: of the run.
        into: what they find.
        save: called after each.
    """
    make = partial(Session, settings)
    worker: Isolated | Inline = Isolated(make) if settings.device == "cuda" else Inline(make)
    with closing(worker):
        for task in tasks:
            into.progress.step(task.name)
            if settings.left <= 0:
                into.not_begun.append(task.name)
            else:
                run_task(task, settings, worker, into)
                save()
            into.progress.done()


def run_task(task: Task, settings: Settings, worker: Worker, into: Collected) -> None:
    """Run a task, and again without the provider that failed, as long as one does."""
    left: Task | None = task
    while left is not None:
        failure = worker.run(left, into)
        if failure is None:
            return
        into.failed(left, settings.device, failure)
        worker.make = partial(Session, settings, into.limits)  # a fresh process doesn't measure the limits again
        left = left.without(failure.who)
