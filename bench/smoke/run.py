"""``python -m bench smoke``: every Triton kernel once, forward and backward; is what it computes right?"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import hia_kernels
from hia_kernels import testing

from ..launches.compile import compile_all
from ..launches.device import TARGETS, target_of
from ..launches.record import recorded
from ..launches.workloads import stored_configurations
from ..measure.poison import poison_uninitialised
from ..measure.timing import exact_matmuls, synchronize
from ..measure.worker import Channel, DeviceFailed, Inline, Isolated, Worker
from ..progress import Progress
from ..records import environment
from ..records.devices import torch_dtype
from ..records.files import results_folder, shown, write_json
from ..records.resume import UNFINISHED, is_same_run, read_earlier
from ..workloads import op_entry
from .cases import Case, cases, kernels, launched

FILE = "smoke.json"
OK, FAILED, REFUSED = "ok", "failed", "refused"
NOT_LAUNCHED = "not launched"


@dataclass(frozen=True)
class Result:
    """The outcome of a case.

    Attributes:
        case: its label.
        status: "ok", "failed", or "refused": the row does not serve such a call.
        problem: why it isn't "ok"; else "".
        kernels: that were launched.
    """

    case: str
    status: str
    problem: str
    kernels: tuple[str, ...]


def inputs_of(case: Case, device: str) -> dict[str, Any]:
    """Draw a case's arguments, the same in every run."""
    return op_entry(case.op).inputs.make_inputs(case.shape, torch_dtype(case.dtype), device, 0)


def results_of(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Run the case's row forward and backward: outputs, and gradients, by name."""
    entry = op_entry(case.op)
    with hia_kernels.use_backend(case.row):
        return testing.forward_backward(entry.public, inputs, entry.inputs.DIFFERENTIABLE)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two results are the same, bit by bit."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def problems_of(case: Case, device: str) -> list[str]:
    """Run a case twice on poisoned memory; say what is wrong with its results."""
    entry, inputs = op_entry(case.op), inputs_of(case, device)
    with ExitStack() as stack:
        poison_uninitialised(lambda owner, name, value: stack.enter_context(mock.patch.object(owner, name, value)))
        first, second = results_of(case, inputs), results_of(case, inputs)
        synchronize(device)
    dtype, names = torch_dtype(case.dtype), entry.inputs.DIFFERENTIABLE
    expected = testing.expect(entry.reference, inputs, names, dtype=dtype)
    wrong = [problem for name in expected.plain if (problem := expected.problem(name, first[name])) is not None]
    return wrong + [f"{name}: another run has other bits" for name in first if not same_bits(first[name], second[name])]


class Session:
    """Runs cases on a device.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def run(self, case: Case, channel: Channel) -> None:
        """Run a case.

        Raises:
            DeviceFailed: an illegal access, say, makes all later calls of the process fail.
        """
        channel.say(case.label, case.label)
        problems: list[str] = []
        with exact_matmuls(), stored_configurations(used=False), launched() as found:
            try:
                problems = problems_of(case, self.device)
                status = FAILED if problems else OK
            except NotImplementedError as error:
                status, problems = REFUSED, [str(error)]
            except Exception as error:
                status, problems = FAILED, [f"{type(error).__name__}: {error}"]
        try:
            synchronize(self.device)
        except Exception as error:
            raise DeviceFailed(f"the device failed ({str(error).partition(chr(10))[0]})") from error
        channel.found(Result(case.label, status, "; ".join(problems)[:2000], tuple(sorted(found))))


@dataclass
class Found:
    """A run's findings; the channel of its cases.

    Attributes:
        progress: told what is done.
        path: of the file that is kept up to date.
        environment: of the run.
        results: by case.
    """

    progress: Progress
    path: Path
    environment: dict[str, Any]
    results: dict[str, Result] = field(default_factory=dict)

    def say(self, text: str, who: str = "", seconds: float | None = None) -> None:
        """Show what is being done."""
        self.progress.step(text)

    def found(self, item: Result) -> None:
        """Keep a result, print it and write all of them."""
        self.results[item.case] = item
        line = f"{item.status:<8} {item.case}  ({', '.join(item.kernels) or 'no kernel of ours'})"
        print(f"{line}: {item.problem}" if item.problem else line, flush=True)
        write_json(
            self.path, {"environment": self.environment, "results": [asdict(one) for one in self.results.values()]}
        )


def run(
    device: str,
    ops: Sequence[str],
    *,
    minutes: float | None,
    jobs: int,
    out: Path | None,
    record: bool,
    resume: bool,
) -> int:
    """Run every case, print a verdict a kernel.

    Returns:
        0; 1 if a case failed or a kernel was not launched; 75 if a run that resumes did not reach every case; 130 after
        Ctrl-C, with what was found written.
    """
    facts = environment.describe(device)
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    path = results_folder(facts["device"], out=out, record=record) / FILE
    before = {one.case: one for one in earlier(path, facts) if one.status != FAILED} if resume else {}
    every = cases(device, ops)
    left = [case for case in every if case.label not in before]
    print(f"{len(left)} of {len(every)} cases are left to do", flush=True)
    if device == "cuda" and jobs > 1:
        compile_ahead(left, jobs)
    worker: Worker = Isolated(partial(Session, device)) if device == "cuda" else Inline(partial(Session, device))
    over = interrupted = False
    with Progress(len(left)) as progress, closing(worker):
        found = Found(progress, path, facts, dict(before))
        try:
            for case in left:
                if time.monotonic() > end:
                    over = True
                    break
                failure = worker.run(case, found)
                if failure is not None:
                    found.found(Result(case.label, FAILED, failure.reason, ()))
                progress.done()
        except KeyboardInterrupt:
            interrupted = True
    results = [found.results[case.label] for case in every if case.label in found.results]
    verdicts = verdicts_of(results, kernels(ops))
    print_verdicts(verdicts)
    print(f"written: {shown(path)}")
    if interrupted:
        return 130
    if over:
        print(f"not reached, the time is over: {len(every) - len(results)} of {len(every)} cases")
    failed = any(one.status == FAILED for one in results)
    missed = device == "cuda" and not over and NOT_LAUNCHED in verdicts.values()
    return 1 if failed or missed else UNFINISHED if over else 0


def earlier(path: Path, facts: dict[str, Any]) -> list[Result]:
    """Read the results of this commit on this device; none where there is no such file."""

    def parse(content: Any) -> list[Result]:
        rows = content["results"] if is_same_run(content["environment"], facts) else []
        return [Result(**{**row, "kernels": tuple(row["kernels"])}) for row in rows]

    return read_earlier(path, parse, [])


def compile_ahead(todo: Iterable[Case], jobs: int) -> None:
    """Compile what the cases will launch, in parallel, where this GPU is one that launches can be recorded for."""
    target = target_of(torch.cuda.get_device_capability())
    if target is None:
        return
    with stored_configurations(used=False), recorded(TARGETS[target]) as recording:
        for case in todo:
            try:
                results_of(case, inputs_of(case, "cuda"))
            except NotImplementedError:  # refused, as it will be
                continue
    print(f"compiling {len(recording.launches)} kernels with {jobs} processes", flush=True)
    compile_all([(launch, target) for launch in recording.launches], jobs=jobs, fresh=True)


def verdicts_of(results: Iterable[Result], known: Iterable[str]) -> dict[str, str]:
    """Judge each kernel by the cases that launched it: "ok", "failed", or "not launched"."""
    verdicts = dict.fromkeys(known, NOT_LAUNCHED)
    for result in results:
        for kernel in result.kernels:
            if verdicts.get(kernel) in (NOT_LAUNCHED, OK) and result.status != REFUSED:
                verdicts[kernel] = result.status
    return verdicts


def print_verdicts(verdicts: dict[str, str]) -> None:
    """Print a line a kernel, and how many there are of each verdict."""
    for kernel, verdict in verdicts.items():
        print(f"{verdict:<12} {kernel}")
    counts = {word: list(verdicts.values()).count(word) for word in (OK, FAILED, NOT_LAUNCHED)}
    print(f"{len(verdicts)} kernels: " + ", ".join(f"{count} {word}" for word, count in counts.items()))
