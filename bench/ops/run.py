"""Every op and composite beside every peer and the device's limits: ``python -m bench ops``."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..measure import costs
from ..measure import roofline as limits
from ..measure.accuracy import Truth, results_of, truth_of
from ..measure.memory import memory_of, peak_bytes
from ..measure.roofline import DTYPES, Limits
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
from ..providers.bound import Bound, backward_call, both_call, dout_like
from ..providers.layers import make_weights
from ..providers.registry import GRADIENT_MODES, Provider, all_providers
from ..records import environment
from ..records.record import Measurement
from ..workloads import Inputs, Workload, make_inputs
from .options import Resume, parse, tasks_of, too_slow_to_compile
from .output import Steps, Writer, console_for, is_ours, print_end, print_failures, print_list, print_report

SECONDS = {"cpu": 0.25, "cuda": 0.3}  # of repetitions, for each provider of a workload in a mode
QUICK_BUDGET = Budget(0.02, at_least=2, at_most=4)
COMPILE_SECONDS = {"cpu": 45.0, "cuda": 60.0}  # to a first result, in a run that has to end
LATE_S = 5.0  # what is begun just before the end of a run may take that long beyond it
UNFORCED = ("hia", "textbook", "gemms")  # ours, with a backend for every input unless one is forced
OVER = "not run: --minutes was over before its turn"
NO_KERNEL = ("no available kernel", "no operator found", "not supported", "not implemented for")


@dataclass
class Run:
    """What is fixed for a run.

    Attributes:
        device: "cpu" or "cuda".
        providers: of the task at hand, in order.
        limits: of the device.
        environment: for the records.
        quick: a smoke test.
        saves_time: nothing was asked for by name, so what takes minutes to compile is left out on CPUs.
        clock: of calls on the device.
        records: what was found so far.
        seconds: of repetitions, for each provider of a workload in a mode; None takes the device's.
        at_least: repetitions, however long they take.
        compile_seconds: what a provider that compiles may take to its first result; None doesn't limit it.
        end: when the run is over, by ``perf_counter``; None where it has no end.
        task: its number, of what is at hand.
        failure: how the device failed, after which nothing can run on it in this process; None if it works.
        resume: where a fresh process can go on then.
        cut: whether something wasn't run because the run was over.
        say: told what is being done.
    """

    device: str
    providers: list[Provider]
    limits: Limits
    environment: dict[str, Any]
    quick: bool
    saves_time: bool
    clock: Clock
    records: list[Measurement] = field(default_factory=list)
    seconds: float | None = None
    at_least: int = 4
    compile_seconds: float | None = None
    end: float | None = None
    task: int = 0
    failure: str | None = None
    resume: Resume = field(default_factory=Resume)
    cut: bool = False
    say: Callable[[str], None] = lambda _: None

    @property
    def left(self) -> float:
        """Seconds until it is over."""
        return float("inf") if self.end is None else self.end - time.perf_counter()

    def budget(self, contenders: int) -> Budget:
        """For so many of a workload in a mode; less where the run is nearly over."""
        if self.quick:
            return QUICK_BUDGET
        seconds = contenders * (SECONDS[self.device] if self.seconds is None else self.seconds)
        return Budget(seconds, self.at_least) if seconds < self.left else Budget(max(0.0, self.left), at_least=2)

    def allowance(self, *, compiles: bool) -> float | None:
        """Seconds that a provider may take to its first result; None doesn't limit it."""
        own = self.compile_seconds if compiles else None
        late = None if self.end is None else max(0.0, self.left) + LATE_S
        return min((seconds for seconds in (own, late) if seconds is not None), default=None)

    def stopped(self) -> str | None:
        """Why nothing more can be run; None if it can."""
        if self.failure is not None:
            return f"not run: {self.failure}"
        if self.left > 0:
            return None
        self.cut = True
        return OVER

    def check_device(self, provider: str, workload: Workload) -> str | None:
        """How the device failed in this provider's work. An illegal access, say, makes all later calls of the process
        fail, which is none of the others' faults."""
        if self.failure is None:
            try:
                synchronize(self.device)
            except Exception as raised:
                why = str(raised).strip().partition("\n")[0]
                self.failure = f"the device failed in {provider} {workload.op} {workload.name} ({why})"
                self.resume = self.resume.after(self.task, provider, [one.name for one in self.providers])
        return self.failure


@dataclass
class Contender:
    """A provider that passed the gate of a workload in a mode, or a limit, which has no result to check.

    Attributes:
        provider: who.
        bound: made ready.
        error: relative RMS; None of a limit.
        prepare_s: to the first result, seconds.
        call: what is timed.
        peak: bytes, of one call.
        activations: bytes alive between forward and backward, with the forward's results; None without gradients.
    """

    provider: Provider
    bound: Bound
    error: float | None
    prepare_s: float
    call: Callable[[], Any] = lambda: None
    peak: int | None = None
    activations: int | None = None


@dataclass(frozen=True)
class Subject:
    """A workload in one dtype, with its inputs.

    Attributes:
        workload: op and case.
        dtype: its name.
        inputs: arguments.
        weights: of a composite.
    """

    workload: Workload
    dtype: str
    inputs: Inputs
    weights: dict[str, Tensor] | None

    def truth(self, *, gradients: bool) -> Truth:
        """The reference's results."""
        return truth_of(self.workload, self.inputs, self.weights, DTYPES[self.dtype], gradients=gradients)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print.

    Returns:
        0; 1 if a row of ours or the device failed, or nothing could be measured: a peer that fails is a red row, and
        named at the end; 2 if the records of before can't be read; 130 after Ctrl-C, with what was measured written.
    """
    options = parse(arguments)
    console = console_for(sys.stdout)
    providers = [all_providers()[name] for name in options.provider]
    if options.quick:
        providers = [provider for provider in providers if not provider.compiles]
    if options.list:
        print_list(options.plan, providers, options, console)
        return 0
    started = time.perf_counter()
    facts = environment.describe(options.device, "bench.ops.run")
    try:
        writer = Writer(options, facts["device"])
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    left_out: list[str] = []
    interrupted = False
    run: Run | None = None
    try:
        tasks = tasks_of(options, providers)
        with exact_matmuls(), Steps(console_for(sys.stderr), len(tasks)).shown() as steps:
            steps.now("measuring the device's limits")
            run = start(options, facts, started)
            for run.task, task in enumerate(tasks):
                steps.now(task.name)
                run.providers = options.resume.providers(run.task, task.providers)
                if run.stopped() == OVER:
                    left_out.append(task.name)
                elif run.providers:
                    measure_workload(run, task.workload, task.dtype, task.modes)
                    writer(run.records)
                steps.done()
    except KeyboardInterrupt:
        interrupted = True
    records = run.records if run is not None else []
    failure = run.failure if run is not None else None
    whole = not (options.filtered or interrupted or failure or run is None or run.cut or options.resume != Resume())
    writer(records, complete=whole)
    print_report(records, run.limits if run is not None else None, left_out, console)
    print_failures(records, console)
    print_end(interrupted, run, writer.paths, time.perf_counter() - started, console)
    if interrupted:
        return 130
    nothing = run is not None and options.resume == Resume() and all(record.status != "ok" for record in records)
    return 1 if failure or nothing or any(record.status == "failed" and is_ours(record) for record in records) else 0


def start(options: Any, facts: dict[str, Any], started: float) -> Run:
    """Measure the limits; ``--minutes`` count from ``started``."""
    found = limits.measure(options.device, options.dtype, quick=options.quick)
    clock = CudaClock() if options.device == "cuda" else cpu_clock
    facts = {**facts, "limits": found.to_dict()}
    run = Run(options.device, [], found, facts, options.quick, not options.filtered, clock, resume=options.resume)
    if options.minutes:
        run.end, run.compile_seconds = started + 60 * options.minutes, COMPILE_SECONDS[options.device]
    return run


def measure_workload(run: Run, workload: Workload, dtype: str, modes: Sequence[str]) -> None:
    """All providers in all modes. A case whose reference raises, too large for the device say, is a failed row for
    every mode that has none yet."""
    finished: set[str] = set()
    try:
        if run.stopped() is not None:
            refuse_rest(run, workload, dtype, modes)
            return
        inputs = make_inputs(workload, DTYPES[dtype], run.device)
        composite = workload.level == "composite"
        weights = make_weights(workload.case, DTYPES[dtype], run.device) if composite else None
        subject = Subject(workload, dtype, inputs, weights)
        for gradients in (False, True):
            chosen = [mode for mode in modes if (mode in GRADIENT_MODES) == gradients]
            if chosen:
                measure_modes(run, subject, chosen, finished, gradients=gradients)
    except Exception as raised:
        run.check_device("the reference of", workload)
        reason = f"the inputs or the reference raised {refusal(raised, [])['reason']}"
        for mode in modes:
            if mode not in finished:
                record(run, workload, "reference", mode, dtype, status="failed", reason=reason)
    if run.device == "cuda" and run.check_device("the last call of", workload) is None:
        torch.cuda.empty_cache()


def refuse_rest(run: Run, workload: Workload, dtype: str, modes: Sequence[str]) -> None:
    """Rows of a workload that isn't run at all."""
    for mode in modes:
        for provider in run.providers:
            if provider.serves(workload):
                reason = run.stopped()
                record(run, workload, provider.name, mode, dtype, status="unavailable", reason=reason)


def measure_modes(run: Run, subject: Subject, modes: Sequence[str], finished: set[str], *, gradients: bool) -> None:
    """Modes that need gradients, or those that don't: every provider is bound and checked once for them. A mode that
    has its rows is added to ``finished``."""
    torch._dynamo.reset()  # a function compiled for many shapes would be given up
    run.say("the reference")
    truth: Truth | None = None
    if run.stopped() is None:
        with suppress(OutOfTime), time_limit(run.allowance(compiles=False)):
            truth = subject.truth(gradients=gradients)
    if truth is None:
        refuse_rest(run, subject.workload, subject.dtype, modes)
        finished.update(modes)
        return
    verdicts: dict[str, Contender | dict[str, str]] = {}
    for provider in run.providers:
        if not provider.serves(subject.workload):
            continue
        reason = run.stopped() or unavailable_reason(run, provider, subject, modes[0])
        if reason is not None:
            verdicts[provider.name] = {"status": "unavailable", "reason": reason}
            continue
        run.say(f"checking {provider.name}")
        verdicts[provider.name] = admit(run, subject, truth, provider, gradients=gradients)
        problem = run.check_device(provider.name, subject.workload)
        if problem is not None:
            verdicts[provider.name] = {"status": "failed", "reason": problem}
    outs = [tensor for name, tensor in truth.plain.items() if name.startswith("out")]
    del truth  # in twice the precision, with every gradient: more than all that is timed
    for mode in modes:
        time_mode(run, subject, verdicts, outs, mode)
        finished.add(mode)


def unavailable_reason(run: Run, provider: Provider, subject: Subject, mode: str) -> str | None:
    """The provider's own, or that this run leaves it out."""
    if run.saves_time and provider.compiles and too_slow_to_compile(run.device, subject.workload):
        return "left out to save time where nothing was asked for by name"
    return provider.unavailable_reason(run.device, DTYPES[subject.dtype], subject.workload, mode)


def time_mode(
    run: Run, subject: Subject, verdicts: dict[str, Contender | dict[str, str]], outs: list[Tensor], mode: str
) -> None:
    """Time those that passed, in turns; a row for everybody. ``outs`` are the reference's, for their size."""
    workload, dtype = subject.workload, subject.dtype
    contenders: dict[str, Contender] = {}
    for name, verdict in verdicts.items():
        refused = prepare_call(run, subject, verdict, mode) if isinstance(verdict, Contender) else verdict
        if refused is None:
            contenders[name] = verdict
        else:
            record(run, workload, name, mode, dtype, **refused)
    reason = run.stopped()
    if reason is not None:
        for name in contenders:
            record(run, workload, name, mode, dtype, status="unavailable", reason=reason)
    if not contenders or reason is not None:
        return
    run.say(f"timing {mode}")
    timed = interleaved(
        {name: contender.call for name, contender in contenders.items()},
        DispatchClock(run.device) if mode == "dispatch" else run.clock,
        run.budget(len(contenders)),
        shortest_ms=0.0 if run.device == "cuda" and mode != "dispatch" else 0.5,
    )
    ended = [name for name, samples in timed.items() if samples.error is not None]
    culprit = min(ended, key=lambda name: len(timed[name].times_ms), default="timing")  # whose call raised first
    broken = run.check_device(culprit, workload) is not None
    found = (workload, subject.inputs, subject.weights)
    flops = costs.flops(*found, mode)
    moved = costs.moved_bytes(*found, outs, mode, itemsize=DTYPES[dtype].itemsize)
    for name, samples in timed.items():
        if broken and samples.error is not None and name != culprit:
            record(run, workload, name, mode, dtype, status="unavailable", reason=run.stopped())
        else:
            record_times(run, subject, mode, contenders[name], samples, flops, moved)


def prepare_call(run: Run, subject: Subject, contender: Contender, mode: str) -> dict[str, str] | None:
    """A status and a reason if it can't be timed."""
    reason = run.stopped()
    if reason is not None:
        return {"status": "unavailable", "reason": reason}
    refused = make_call(contender, mode, run.device)
    problem = run.check_device(contender.provider.name, subject.workload)
    return refused if problem is None else {"status": "failed", "reason": problem}


def admit(
    run: Run, subject: Subject, truth: Truth, provider: Provider, *, gradients: bool
) -> Contender | dict[str, str]:
    """The provider bound and checked, or a status and a reason."""
    began = time.perf_counter()
    seconds = run.allowance(compiles=provider.compiles)
    with warnings.catch_warnings(record=True) as caught, always_warning():
        warnings.simplefilter("always")
        try:
            with time_limit(seconds):
                bound = provider.bind(subject.workload, subject.inputs, subject.weights, gradients=gradients)
                problem, error = checked(bound, truth, gradients=gradients)
        except OutOfTime:
            if run.stopped() is not None:
                return {"status": "unavailable", "reason": OVER}
            reason = f"compiling took more than the {seconds:.0f} s it was given, which is no bound of ours to meet"
            return {"status": "unavailable", "reason": reason}
        except Exception as raised:
            return refusal(raised, [str(warning.message) for warning in caught], provider.name)
    if problem is not None:
        return {"status": "failed", "reason": f"beyond the tolerance: {problem}"}
    return Contender(provider, bound, error, time.perf_counter() - began)


def checked(bound: Bound, truth: Truth, *, gradients: bool) -> tuple[str | None, float | None]:
    """What is wrong with the results, and their error; a limit has none and is only run."""
    if bound.limit:
        with torch.no_grad():
            bound.forward()
        return None, None
    return truth.check(results_of(bound, truth.exact, gradients=gradients))


@contextmanager
def always_warning() -> Iterator[None]:
    """torch says why it refuses an attention in warnings, each only once unless it is told otherwise."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        yield
    finally:
        torch.set_warn_always(before)


def refusal(raised: Exception, warned: list[str], provider: str = "") -> dict[str, str]:
    """A library that says it takes no such input isn't available here; anything else is a failure. Ours takes every
    input, unless a backend is forced: from it the same words are a failure."""
    text = str(raised).strip().partition("\n")[0]
    refuses = isinstance(raised, NotImplementedError) or any(phrase in str(raised).lower() for phrase in NO_KERNEL)
    must = provider in UNFORCED and os.environ.get("HIA_BACKEND", "auto") == "auto"
    if refuses and not must:
        why = "; ".join(dict.fromkeys(line.partition(" (Triggered")[0].strip() for line in warned))
        return {"status": "unavailable", "reason": f"{text} {why}".strip()}
    return {"status": "failed", "reason": f"{type(raised).__name__}: {text}"}


def make_call(contender: Contender, mode: str, device: str) -> dict[str, str] | None:
    """What is timed; graphs and incoming gradients are made before. Calls it once for the peak of its memory.

    Returns:
        A status and a reason if that raised.
    """
    bound = contender.bound
    try:
        bound.restore()
        if mode in GRADIENT_MODES:
            kept = memory_of(bound.forward, device)
            outs, contender.activations = kept.result, kept.left
            douts = dout_like(outs)
            contender.call = backward_call(bound, outs, douts) if mode == "backward" else both_call(bound, douts)
        else:
            contender.call = torch.no_grad()(bound.forward)
        contender.peak = peak_bytes(contender.call, device)
    except Exception as raised:
        return refusal(raised, [], contender.provider.name)
    return None


def record_times(
    run: Run, subject: Subject, mode: str, contender: Contender, samples: Samples, flops: int, moved: int
) -> None:
    """A row of a provider that was timed, or that raised while it was."""
    workload, dtype, name = subject.workload, subject.dtype, contender.provider.name
    if samples.error is not None or not samples.times_ms:
        record(run, workload, name, mode, dtype, **refusal(samples.error or RuntimeError("no repetition"), [], name))
        return
    p20, p50, p80 = (samples.percentile(percent) for percent in (20, 50, 80))
    least = costs.least_flops(workload, flops, DTYPES[dtype].itemsize)
    roofline = run.limits.roofline_ms(least, moved, dtype)
    dispatch = mode == "dispatch"  # the device's limits say nothing about the CPU's work before a call
    known = {
        "error": contender.error,
        "limit": contender.bound.limit or None,
        "activation_bytes": contender.activations,
    }
    extra = {name: value for name, value in known.items() if value is not None}
    extra |= {"first_call_s": round(contender.prepare_s, 3), **contender.bound.notes()}
    record(
        run,
        workload,
        name,
        mode,
        dtype,
        status="ok",
        p20_ms=p20,
        p50_ms=p50,
        p80_ms=p80,
        noisy=samples.noisy,
        repeats=len(samples.times_ms),
        flops=flops,
        bytes=moved,
        peak_bytes=contender.peak,
        extra=extra,
        roofline_ms=None if dispatch else roofline,
        percent_of_roofline=None if dispatch else 100 * roofline / p50,
    )


def record(run: Run, workload: Workload, provider: str, mode: str, dtype: str, **values: Any) -> None:
    """Add a measurement."""
    where = {"level": workload.level, "op": workload.op, "case": workload.name, "device": run.device}
    found = Measurement(**where, provider=provider, mode=mode, dtype=dtype, environment=run.environment, **values)
    run.records.append(found)


if __name__ == "__main__":
    sys.exit(main())
