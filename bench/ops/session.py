"""One workload beside everybody: whose results are right is timed, in turns. What ``ops`` and ``targets`` run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..measure import costs, roofline
from ..measure.accuracy import Truth
from ..measure.roofline import Limits
from ..measure.timing import (
    Budget,
    Clock,
    CudaClock,
    DispatchClock,
    OutOfTime,
    Samples,
    cpu_clock,
    exact_matmuls,
    interleaved,
    synchronize,
    time_limit,
)
from ..measure.worker import Channel, DeviceFailed
from ..providers.layers import make_weights
from ..providers.registry import GRADIENT_MODES, Provider, all_providers
from ..records.devices import torch_dtype
from ..records.record import Measurement
from ..workloads import make_inputs
from .entries import OVER, Entry, Refusal, Subject, admit, make_call, refusal
from .plan import Task, too_slow_to_compile

SECONDS = {"cpu": 0.25, "cuda": 0.3}  # of repetitions, for each provider of a workload in a mode
QUICK_BUDGET = Budget(0.02, at_least=2, at_most=4)
LATE_S = 5.0  # what is begun just before the end of a run may take that long beyond it


@dataclass(frozen=True)
class Settings:
    """Settings that hold for a whole run.

    Attributes:
        device: "cpu" or "cuda".
        dtypes: whose limits are measured.
        quick: a smoke test.
        saves_time: nothing was asked for by name, so what takes minutes to compile is left out on CPUs.
        seconds: of repetitions, for each provider of a workload in a mode; None takes the device's.
        at_least: repetitions, however long they take.
        compile_seconds: what a provider that compiles may take to its first result; None doesn't limit it.
        end: when the run is over, by ``time.monotonic``, which the machine's processes share; None where it has none.
    """

    device: str
    dtypes: tuple[str, ...]
    quick: bool = False
    saves_time: bool = False
    seconds: float | None = None
    at_least: int = 4
    compile_seconds: float | None = None
    end: float | None = None

    @property
    def left(self) -> float:
        """Return the seconds until the run is over."""
        return float("inf") if self.end is None else self.end - time.monotonic()

    def budget(self, entries: int) -> Budget:
        """Return what so many of a workload in a mode get; less where the run is nearly over."""
        if self.quick:
            return QUICK_BUDGET
        seconds = entries * (SECONDS[self.device] if self.seconds is None else self.seconds)
        return Budget(seconds, self.at_least) if seconds < self.left else Budget(max(0.0, self.left), at_least=2)

    def allowance(self, *, compiles: bool) -> float | None:
        """Return seconds that a provider may take to its first result; None doesn't limit it."""
        own = self.compile_seconds if compiles else None
        late = None if self.end is None else max(0.0, self.left) + LATE_S
        return min((seconds for seconds in (own, late) if seconds is not None), default=None)


class Session:
    """Runs tasks: hands over the device's limits once, then rows without an environment.

    Args:
        settings: of the run.
        limits: of the device; None measures them before the first task.
    """

    def __init__(self, settings: Settings, limits: Limits | None = None) -> None:
        self.settings, self.limits = settings, limits
        self.clock: Clock = CudaClock() if settings.device == "cuda" else cpu_clock

    def run(self, task: Task, channel: Channel) -> None:
        """Run a task.

        Raises:
            DeviceFailed: an illegal access, say, makes all later calls of the process fail.
        """
        with exact_matmuls():
            if self.limits is None:
                channel.say("measuring the device's limits")
                settings = self.settings
                self.limits = roofline.measure(settings.device, settings.dtypes, quick=settings.quick)
                channel.found(self.limits)
            known = all_providers()
            providers = [known[name] for name in task.providers]
            Measuring(self.settings, self.limits, self.clock, channel, task, providers).run()


@dataclass
class Measuring:
    """One task at work.

    Attributes:
        settings: of the run.
        limits: of the device.
        clock: of calls on the device.
        channel: told what is done and found.
        task: what is measured.
        providers: who is, in order.
    """

    settings: Settings
    limits: Limits
    clock: Clock
    channel: Channel
    task: Task
    providers: list[Provider]

    def run(self) -> None:
        """Measure all providers in all modes.

        A case whose reference raises, too large for the device say, is a failed row for every mode that has none yet.

        Raises:
            DeviceFailed: see :class:`Session`.
        """
        finished: set[str] = set()
        workload, dtype = self.task.workload, torch_dtype(self.task.dtype)
        try:
            if self.settings.left <= 0:
                self.refuse_rest(self.task.modes)
                return
            self.channel.say("its inputs")
            inputs = make_inputs(workload, dtype, self.settings.device)
            composite = workload.level == "composite"
            weights = make_weights(workload.case, dtype, self.settings.device) if composite else None
            subject = Subject(workload, self.task.dtype, inputs, weights)
            for gradients in (False, True):
                chosen = [mode for mode in self.task.modes if (mode in GRADIENT_MODES) == gradients]
                if chosen:
                    self.measure_modes(subject, chosen, finished, gradients=gradients)
        except DeviceFailed:
            raise
        except Exception as raised:
            self.check_device()
            reason = f"the inputs or the reference raised {refusal(raised, [])['reason']}"
            for mode in self.task.modes:
                if mode not in finished:
                    self.row("reference", mode, status="failed", reason=reason)
        self.check_device()
        if self.settings.device == "cuda":
            torch.cuda.empty_cache()

    def check_device(self) -> None:
        """Wait for the device.

        Raises:
            DeviceFailed: it failed in what was done last.
        """
        try:
            synchronize(self.settings.device)
        except Exception as raised:
            why = str(raised).strip().partition("\n")[0]
            raise DeviceFailed(f"the device failed ({why})") from raised

    def refuse_rest(self, modes: Sequence[str]) -> None:
        """Say of everybody that the run was over."""
        for mode in modes:
            for provider in self.providers:
                if provider.serves(self.task.workload):
                    self.row(provider.name, mode, status="unavailable", reason=OVER)

    def measure_modes(self, subject: Subject, modes: Sequence[str], finished: set[str], *, gradients: bool) -> None:
        """Measure modes that need gradients, or those that don't; a mode that has its rows is added to ``finished``.

        Every provider is bound and checked once for them.
        """
        torch._dynamo.reset()  # a function compiled for many shapes would be given up
        allowed = self.settings.allowance(compiles=False)
        self.channel.say("the reference", seconds=allowed)
        truth: Truth | None = None
        if self.settings.left > 0:
            with suppress(OutOfTime), time_limit(allowed):
                truth = subject.truth(gradients=gradients)
        if truth is None:
            self.refuse_rest(modes)
            finished.update(modes)
            return
        verdicts: dict[str, Entry | Refusal] = {}
        for provider in self.providers:
            if provider.serves(subject.workload):
                verdicts[provider.name] = self.verdict(subject, truth, provider, modes[0], gradients=gradients)
        outs = [tensor for name, tensor in truth.plain.items() if name.startswith("out")]
        del truth  # in twice the precision, with every gradient: more than all that is timed
        for mode in modes:
            self.time_mode(subject, verdicts, outs, mode)
            finished.add(mode)

    def verdict(
        self, subject: Subject, truth: Truth, provider: Provider, mode: str, *, gradients: bool
    ) -> Entry | Refusal:
        """Return the provider bound and checked, or a status and a reason."""
        reason = OVER if self.settings.left <= 0 else self.unavailable_reason(provider, subject, mode)
        if reason is not None:
            return {"status": "unavailable", "reason": reason}
        seconds = self.settings.allowance(compiles=provider.compiles)
        self.channel.say(f"checking {provider.name}", provider.name, seconds)
        own = self.settings.compile_seconds if provider.compiles else None
        over = seconds is not None and seconds != own
        found = admit(subject, truth, provider, gradients=gradients, seconds=seconds, over=over)
        self.check_device()
        return found

    def unavailable_reason(self, provider: Provider, subject: Subject, mode: str) -> str | None:
        """Return the provider's own reason, or that this run leaves it out."""
        device = self.settings.device
        if self.settings.saves_time and provider.compiles and too_slow_to_compile(device, subject.workload):
            return "left out to save time where nothing was asked for by name"
        return provider.unavailable_reason(device, torch_dtype(subject.dtype), subject.workload, mode)

    def time_mode(self, subject: Subject, verdicts: dict[str, Entry | Refusal], outs: list[Tensor], mode: str) -> None:
        """Time those that passed, in turns; a row for everybody. ``outs`` are the reference's, for their size."""
        entries: dict[str, Entry] = {}
        for name, verdict in verdicts.items():
            refused = self.prepare_call(verdict, mode) if isinstance(verdict, Entry) else verdict
            if isinstance(verdict, Entry) and refused is None:
                entries[name] = verdict
            elif refused is not None:
                self.row(name, mode, **refused)
        if self.settings.left <= 0:
            for name in entries:
                self.row(name, mode, status="unavailable", reason=OVER)
        elif entries:
            self.time_entries(subject, entries, outs, mode)

    def time_entries(self, subject: Subject, entries: dict[str, Entry], outs: list[Tensor], mode: str) -> None:
        """Time them.

        Raises:
            DeviceFailed: in the work of the provider whose call raised first, which is the one named last.
        """
        device, workload = self.settings.device, subject.workload
        self.channel.say(f"timing {mode}")
        timed = interleaved(
            {name: entry.call for name, entry in entries.items()},
            DispatchClock(device) if mode == "dispatch" else self.clock,
            self.settings.budget(len(entries)),
            shortest_ms=0.0 if device == "cuda" and mode != "dispatch" else 0.5,
        )
        ended = [name for name, samples in timed.items() if samples.error is not None]
        if ended:  # whose call raised first has fewer repetitions than those behind it
            first = min(ended, key=lambda name: len(timed[name].times_ms))
            self.channel.say(f"timing {mode} of {first}", first)
        self.check_device()
        found = (workload, subject.inputs, subject.weights)
        flops = costs.flops(*found, mode)
        moved = costs.moved_bytes(*found, outs, mode, itemsize=torch_dtype(subject.dtype).itemsize)
        for name, samples in timed.items():
            self.row(name, mode, **self.times(subject, mode, entries[name], samples, flops, moved))

    def prepare_call(self, entry: Entry, mode: str) -> Refusal | None:
        """Make an entry's call; a status and a reason if it can't be timed."""
        if self.settings.left <= 0:
            return {"status": "unavailable", "reason": OVER}
        self.channel.say(f"preparing {mode} of {entry.provider.name}", entry.provider.name)
        refused = make_call(entry, mode, self.settings.device)
        self.check_device()
        return refused

    def times(
        self, subject: Subject, mode: str, entry: Entry, samples: Samples, flops: int, moved: int
    ) -> dict[str, Any]:
        """Return the values of a row of a provider that was timed, or that raised while it was."""
        if samples.error is not None or not samples.times_ms:
            return dict(refusal(samples.error or RuntimeError("no repetition"), [], entry.provider.name))
        p20, p50, p80 = (samples.percentile(percent) for percent in (20, 50, 80))
        least = costs.least_flops(subject.workload, flops, torch_dtype(subject.dtype).itemsize)
        limit = self.limits.roofline_ms(least, moved, subject.dtype)
        dispatch = mode == "dispatch"  # the device's limits say nothing about the CPU's work before a call
        known = {
            "error": entry.error,
            "limit": entry.bound.limit or None,
            "activation_bytes": entry.activations,
        }
        extra = {name: value for name, value in known.items() if value is not None}
        if isinstance(self.clock, CudaClock) and mode != "dispatch":
            extra["queued_ms"] = round(self.clock.queued_ms(entry.call) or 0.0, 4)  # what it took the host
            if self.clock.is_host_bound(entry.call):
                extra["host_bound"] = True
        extra |= {"first_call_s": round(entry.prepare_s, 3), **entry.bound.notes()}
        return {
            "status": "ok",
            "p20_ms": p20,
            "p50_ms": p50,
            "p80_ms": p80,
            "noisy": samples.noisy,
            "repeats": len(samples.times_ms),
            "flops": flops,
            "bytes": moved,
            "peak_bytes": entry.peak,
            "extra": extra,
            "roofline_ms": None if dispatch else limit,
            "percent_of_roofline": None if dispatch else 100 * limit / p50,
        }

    def row(self, provider: str, mode: str, **values: Any) -> None:
        """Hand over a row."""
        self.channel.found(row_of(self.task, self.settings.device, provider, mode, **values))


def row_of(task: Task, device: str, provider: str, mode: str, **values: Any) -> Measurement:
    """Return a row of a task, without its environment."""
    workload = task.workload
    where = {"level": workload.level, "op": workload.op, "case": workload.name, "device": device}
    return Measurement(**where, provider=provider, mode=mode, dtype=task.dtype, **values)
