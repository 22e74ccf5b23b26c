"""Every op and composite beside every peer and the device's limits: ``python -m bench.kernels``."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import costs, environment, limits
from .cases import FIRST, TRAIN_STEPS, Workload
from .composites import make_weights
from .gate import Bound, Truth, backward_call, both_call, dout_like, results_of, truth_of
from .inputs import Inputs, make_inputs
from .kernels_args import parse
from .kernels_output import Steps, console_for, print_interrupted, print_list, print_report
from .limits import DTYPES, Limits
from .measurement import Measurement, write_records
from .providers import GRADIENT_MODES, Provider, all_providers
from .timing import (
    Budget,
    Clock,
    CudaClock,
    DispatchClock,
    OutOfTime,
    Samples,
    cpu_clock,
    exact_matmuls,
    interleaved,
    memory_of,
    peak_bytes,
    time_limit,
)

SECONDS = {"cpu": 0.25, "cuda": 0.3}  # of repetitions, for each provider of a workload in a mode
QUICK_BUDGET = Budget(0.02, at_least=2, at_most=4)
# composites of which a CPU run without names compiles none: the encoder takes minutes, the others are parts of
# second_question, which it does compile
NOT_COMPILED = ("encode", "extract", "inject", "adapter_layer", *TRAIN_STEPS)
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
    say: Callable[[str], None] = lambda _: None

    def budget(self, contenders: int) -> Budget:
        """For so many of a workload in a mode."""
        if self.quick:
            return QUICK_BUDGET
        seconds = SECONDS[self.device] if self.seconds is None else self.seconds
        return Budget(seconds * contenders, at_least=self.at_least)


@dataclass(frozen=True)
class Task:
    """A step of the run.

    Attributes:
        workload: op and case.
        modes: in which it is measured.
        dtype: its name.
        providers: who is.
    """

    workload: Workload
    modes: tuple[str, ...]
    dtype: str
    providers: list[Provider]

    @property
    def name(self) -> str:
        """For the progress bar."""
        return f"{self.workload.op} {self.workload.name} {self.dtype}"


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
        0; 1 if a provider failed; 130 after Ctrl-C, with what was measured written.
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
    facts = environment.describe(options.device, "bench.kernels")
    paths = output_paths(options, facts["device"])
    left_out: list[str] = []
    interrupted = False
    run: Run | None = None
    try:
        tasks = tasks_of(options, providers)
        with exact_matmuls(), Steps(console_for(sys.stderr), len(tasks)).shown() as steps:
            steps.now("measuring the device's limits")
            run = start(options, facts)
            for task in tasks:
                steps.now(task.name)
                if options.minutes and time.perf_counter() - started > 60 * options.minutes:
                    left_out.append(task.name)
                else:
                    run.providers = task.providers
                    measure_workload(run, task.workload, task.dtype, task.modes)
                    write(paths, run.records)
                steps.done()
    except KeyboardInterrupt:
        interrupted = True
    records = run.records if run is not None else []
    write(paths, records)
    print_report(records, run.limits if run is not None else None, left_out, console)
    print_interrupted(interrupted, paths, time.perf_counter() - started, console)
    if interrupted:
        return 130
    return 1 if any(record.status == "failed" for record in records) else 0


def tasks_of(options: Any, providers: list[Provider]) -> list[Task]:
    """In order. On CUDA, where nothing was asked for by name, compiling comes last and for the first shapes only:
    max-autotune takes as long as everything else together."""
    if options.filtered or options.device == "cpu":
        return [Task(*item, dtype, providers) for dtype in options.dtype for item in options.plan]
    plain = [provider for provider in providers if not provider.compiles]
    compiled = [provider for provider in providers if provider.compiles]
    first = [item for item in options.plan if item[0].case.name in FIRST and item[0].op not in NOT_COMPILED]
    tasks = [Task(*item, dtype, plain) for dtype in options.dtype for item in options.plan]
    return tasks + [Task(*item, dtype, compiled) for dtype in options.dtype for item in first]


def start(options: Any, facts: dict[str, Any]) -> Run:
    """Measure the limits."""
    found = limits.measure(options.device, options.dtype, quick=options.quick)
    clock = CudaClock() if options.device == "cuda" else cpu_clock
    facts = {**facts, "limits": found.to_dict()}
    return Run(options.device, [], found, facts, options.quick, not options.filtered, clock)


def output_paths(options: Any, device: str) -> list[Path]:
    """Where records go: a filtered run is no record of the device unless a place is named."""
    folder = options.out
    if folder is None and not options.filtered:
        folder = environment.REPOSITORY / "bench" / "results" / environment.slug(device)
    return [path for path in (folder and folder / "kernels.json", options.json) if path]


def write(paths: list[Path], records: list[Measurement]) -> None:
    """Everything measured so far, to every path; nothing replaces no record."""
    for path in paths if records else []:
        write_records(path, records)


def measure_workload(run: Run, workload: Workload, dtype: str, modes: Sequence[str]) -> None:
    """All providers in all modes. A case whose reference raises, too large for the device say, is a failed row a
    mode."""
    try:
        inputs = make_inputs(workload, DTYPES[dtype], run.device)
        composite = workload.level == "composite"
        weights = make_weights(workload.case, DTYPES[dtype], run.device) if composite else None
        subject = Subject(workload, dtype, inputs, weights)
        for gradients in (False, True):
            chosen = [mode for mode in modes if (mode in GRADIENT_MODES) == gradients]
            if chosen:
                measure_modes(run, subject, chosen, gradients=gradients)
    except Exception as raised:
        reason = f"the inputs or the reference raised {refusal(raised, [])['reason']}"
        for mode in modes:
            record(run, workload, "reference", mode, dtype, status="failed", reason=reason)
    if run.device == "cuda":
        torch.cuda.empty_cache()


def measure_modes(run: Run, subject: Subject, modes: Sequence[str], *, gradients: bool) -> None:
    """Modes that need gradients, or those that don't: every provider is bound and checked once for them."""
    torch._dynamo.reset()  # a function compiled for many shapes would be given up
    run.say("the reference")
    truth = subject.truth(gradients=gradients)
    verdicts: dict[str, Contender | dict[str, str]] = {}
    for provider in run.providers:
        if not provider.serves(subject.workload):
            continue
        reason = unavailable_reason(run, provider, subject, modes[0])
        if reason is not None:
            verdicts[provider.name] = {"status": "unavailable", "reason": reason}
        else:
            run.say(f"checking {provider.name}")
            verdicts[provider.name] = admit(run, subject, truth, provider, gradients=gradients)
    outs = [tensor for name, tensor in truth.plain.items() if name.startswith("out")]
    del truth  # in twice the precision, with every gradient: more than all that is timed
    for mode in modes:
        time_mode(run, subject, verdicts, outs, mode)


def unavailable_reason(run: Run, provider: Provider, subject: Subject, mode: str) -> str | None:
    """The provider's own, or that this run leaves it out."""
    op, case = subject.workload.op, subject.workload.case
    slow = op in NOT_COMPILED or not getattr(case, "is_even", True)
    if run.device == "cpu" and run.saves_time and provider.compiles and slow:
        return "left out to save time where nothing was asked for by name"
    return provider.unavailable_reason(run.device, DTYPES[subject.dtype], subject.workload, mode)


def time_mode(
    run: Run, subject: Subject, verdicts: dict[str, Contender | dict[str, str]], outs: list[Tensor], mode: str
) -> None:
    """Time those that passed, in turns; a row for everybody. ``outs`` are the reference's, for their size."""
    workload, dtype = subject.workload, subject.dtype
    contenders: dict[str, Contender] = {}
    for name, verdict in verdicts.items():
        refused = make_call(verdict, mode, run.device) if isinstance(verdict, Contender) else verdict
        if refused is None:
            contenders[name] = verdict
        else:
            record(run, workload, name, mode, dtype, **refused)
    if not contenders:
        return
    run.say(f"timing {mode}")
    timed = interleaved(
        {name: contender.call for name, contender in contenders.items()},
        DispatchClock(run.device) if mode == "dispatch" else run.clock,
        run.budget(len(contenders)),
        shortest_ms=0.0 if run.device == "cuda" and mode != "dispatch" else 0.5,
    )
    flops = costs.flops(workload, subject.inputs, subject.weights, mode)
    moved = costs.moved_bytes(workload, subject.inputs, subject.weights, outs, mode)
    for name, samples in timed.items():
        record_times(run, subject, mode, contenders[name], samples, flops, moved)


def admit(
    run: Run, subject: Subject, truth: Truth, provider: Provider, *, gradients: bool
) -> Contender | dict[str, str]:
    """The provider bound and checked, or a status and a reason."""
    began = time.perf_counter()
    seconds = run.compile_seconds if provider.compiles else None
    with warnings.catch_warnings(record=True) as caught, always_warning():
        warnings.simplefilter("always")
        try:
            with time_limit(seconds):
                bound = provider.bind(subject.workload, subject.inputs, subject.weights, gradients=gradients)
                problem, error = checked(bound, truth, gradients=gradients)
        except OutOfTime:
            reason = f"compiling took more than the {seconds:.0f} s it was given, which is no bound of ours to meet"
            return {"status": "unavailable", "reason": reason}
        except Exception as raised:
            return refusal(raised, [str(warning.message) for warning in caught])
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


def refusal(raised: Exception, warned: list[str]) -> dict[str, str]:
    """A library that says it takes no such input isn't available here; anything else is a failure."""
    text = str(raised).strip().partition("\n")[0]
    if isinstance(raised, NotImplementedError) or any(phrase in str(raised).lower() for phrase in NO_KERNEL):
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
        return refusal(raised, [])
    return None


def record_times(
    run: Run, subject: Subject, mode: str, contender: Contender, samples: Samples, flops: int, moved: int
) -> None:
    """A row of a provider that was timed, or that raised while it was."""
    workload, dtype, name = subject.workload, subject.dtype, contender.provider.name
    if samples.error is not None or not samples.times_ms:
        record(run, workload, name, mode, dtype, **refusal(samples.error or RuntimeError("no repetition"), []))
        return
    p20, p50, p80 = (samples.percentile(percent) for percent in (20, 50, 80))
    least = costs.least_flops(workload, flops, DTYPES[dtype].itemsize)
    floor = run.limits.floor_ms(least, moved, dtype)
    dispatch = mode == "dispatch"  # the device's limits say nothing about the CPU's work before a call
    known = {"error": contender.error, "limit": contender.bound.limit or None,
             "activation_bytes": contender.activations}  # fmt: skip
    extra = {name: value for name, value in known.items() if value is not None}
    extra |= {"first_call_s": round(contender.prepare_s, 3), **contender.bound.notes()}
    record(
        run, workload, name, mode, dtype, status="ok", p20_ms=p20, p50_ms=p50, p80_ms=p80, noisy=samples.noisy,
        repeats=len(samples.times_ms), flops=flops, bytes=moved, peak_bytes=contender.peak, extra=extra,
        floor_ms=None if dispatch else floor, percent_of_floor=None if dispatch else 100 * floor / p50,
    )  # fmt: skip


def record(run: Run, workload: Workload, provider: str, mode: str, dtype: str, **values: Any) -> None:
    """Add a measurement."""
    where = {"level": workload.level, "op": workload.op, "case": workload.name, "device": run.device}
    found = Measurement(
        **where, provider=provider, mode=mode, dtype=dtype, environment=run.environment, **values
    )  # fmt: skip
    run.records.append(found)


if __name__ == "__main__":
    sys.exit(main())
