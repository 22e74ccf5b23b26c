"""Providers of one workload that may be timed, since their results are right, and what is said of the others."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hia_kernels.core.backend import requested_backend

from ..measure.accuracy import Truth, results_of, truth_of
from ..measure.memory import memory_of, peak_bytes
from ..measure.timing import OutOfTime, time_limit
from ..providers.bound import Bound, backward_call, both_call, dout_like
from ..providers.registry import GRADIENT_MODES, Provider
from ..records.devices import torch_dtype
from ..workloads import Inputs, Workload

OVER = "not run: --minutes was over before its turn"
UNFORCED = ("hia", "textbook", "gemms")  # ours, with a backend for every input unless one is forced
NO_KERNEL = ("no available kernel", "no operator found", "not supported", "not implemented for")
Refusal = dict[str, str]  # "status" and "reason" of a row without times


@dataclass
class Entry:
    """A provider whose results are right in a workload's modes, or a limit, which has no result to check.

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
        """Run the reference."""
        return truth_of(self.workload, self.inputs, self.weights, torch_dtype(self.dtype), gradients=gradients)


def admit(
    subject: Subject, truth: Truth, provider: Provider, *, gradients: bool, seconds: float | None, over: bool = False
) -> Entry | Refusal:
    """Bind a provider and check its results.

    Args:
        subject: what it computes.
        truth: the reference's results.
        provider: who.
        gradients: whether they are taken.
        seconds: what it may take to its first result; None doesn't limit it.
        over: that those seconds are the rest of the run, not what compiling is given.
    """
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught, _always_warning():
        warnings.simplefilter("always")
        try:
            with time_limit(seconds):
                bound = provider.bind(subject.workload, subject.inputs, subject.weights, gradients=gradients)
                problem, error = checked(bound, truth, gradients=gradients)
        except OutOfTime:
            compiling = f"compiling took more than the {seconds:.0f} s it was given, which is no bound of ours to meet"
            return {"status": "unavailable", "reason": OVER if over else compiling}
        except Exception as raised:
            return refusal(raised, [str(warning.message) for warning in caught], provider.name)
    if problem is not None:
        return {"status": "failed", "reason": f"beyond the tolerance: {problem}"}
    return Entry(provider, bound, error, time.perf_counter() - began)


def checked(bound: Bound, truth: Truth | None, *, gradients: bool) -> tuple[str | None, float | None]:
    """Return what is wrong with the results, and their error; a limit has none and is only run."""
    if bound.limit or truth is None:
        with torch.no_grad():
            bound.forward()
        return None, None
    return truth.check(results_of(bound, truth.exact, gradients=gradients))


@contextmanager
def _always_warning() -> Iterator[None]:
    """Let torch warn each time: so it says why it refuses an attention, and unless it is told otherwise only once."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        yield
    finally:
        torch.set_warn_always(before)


def refusal(raised: Exception, warned: list[str], provider: str = "") -> Refusal:
    """Tell a library that says it takes no such input, which isn't available here, from a failure.

    Ours takes every input, unless a backend is forced: from it the same words are a failure.
    """
    text = str(raised).strip().partition("\n")[0]
    refuses = isinstance(raised, NotImplementedError) or any(phrase in str(raised).lower() for phrase in NO_KERNEL)
    must = provider in UNFORCED and requested_backend() == "auto"
    if refuses and not must:
        why = "; ".join(dict.fromkeys(line.partition(" (Triggered")[0].strip() for line in warned))
        return {"status": "unavailable", "reason": f"{text} {why}".strip()}
    return {"status": "failed", "reason": f"{type(raised).__name__}: {text}"}


def make_call(entry: Entry, mode: str, device: str) -> Refusal | None:
    """Make what is timed; graphs and incoming gradients are made before. Calls it once for the peak of its memory.

    Returns:
        A status and a reason if that raised.
    """
    bound = entry.bound
    try:
        bound.restore()
        if mode in GRADIENT_MODES:
            kept = memory_of(bound.forward, device)
            outs, entry.activations = kept.result, kept.left
            douts = dout_like(outs)
            entry.call = backward_call(bound, outs, douts) if mode == "backward" else both_call(bound, douts)
        else:
            entry.call = torch.no_grad()(bound.forward)
        entry.peak = peak_bytes(entry.call, device)
    except Exception as raised:
        return refusal(raised, [], entry.provider.name)
    return None
