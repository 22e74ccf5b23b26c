"""Lists the kernels of workloads, and counts what their mathematics needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..launches.device import Target
from ..launches.workloads import call_of, forward_backward, stored_configurations
from ..measure import costs
from ..providers.layers import make_weights, our_step
from ..records.devices import torch_dtype
from ..workloads import (
    OpEntry,
    Workload,
    composite_entry,
    composites,
    gpu_workloads,
    in_set,
    make_inputs,
    ops,
    workloads,
)
from .steps import Listing, Step, listed

DTYPE, ITEMSIZE = "bf16", 2
MODES = ("forward", "backward")


@dataclass(frozen=True)
class Work:
    """A workload in a mode.

    Attributes:
        workload: op or composite, and case.
        mode: "forward" or "backward".
        flops: of its cheapest exact form, 2 a multiply-add.
        nbytes: that must at least move.
        steps: the kernels it launches.
        call_flops: of each call of an op among them.
    """

    workload: Workload
    mode: str
    flops: int
    nbytes: int
    steps: tuple[Step, ...]
    call_flops: tuple[int, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        """Return op, case and mode, as a record has them."""
        return self.workload.op, self.workload.name, self.mode


def known(measured: Iterable[tuple[str, str]] = ()) -> list[Workload]:
    """List the GPU's set: every op, and every composite that is no training step.

    Args:
        measured: (op, case) that are listed too, outside of that set.
    """
    wanted = {(one.op, one.name) for one in gpu_workloads()} | set(measured)
    inference = [name for name in composites() if not composite_entry(name).trains]
    found = [one for name in ops() for one in workloads(name) if (one.op, one.name) in wanted]
    composed = [one for name in inference for one in workloads(name)]
    return found + [one for one in composed if in_set(one, "gpu") or (one.op, one.name) in wanted]


def collect(chosen: Iterable[Workload], target: Target, begin: Callable[[Workload, int], None]) -> list[Work]:
    """List the kernels of workloads as their tables of backends choose them, with the configurations that were tuned.

    Args:
        chosen: ops and composites.
        target: of :data:`bench.launches.device.TARGETS`.
        begin: called with each workload and its number before it.
    """
    found: list[Work] = []
    for number, workload in enumerate(chosen):
        begin(workload, number)
        lister = _op if isinstance(workload.entry, OpEntry) else _composite
        found += lister(workload, target)
    return found


def _op(workload: Workload, target: Target) -> Iterator[Work]:
    """List an op's kernels, forward without gradients, and backward where it has one."""
    call, count = call_of(workload, DTYPE), workload.entry.inputs
    with stored_configurations(used=True), listed(target) as listing:
        inputs = call.inputs(torch_dtype(DTYPE))
        listing.clear()
        with torch.no_grad():
            call.function(**inputs)
        passes = {"forward": (tuple(listing.steps), tuple(listing.flops))}
        listing.clear()
        forward_backward(call)
        passes["backward"] = tuple(step for step in listing.steps if step.backward), tuple(listing.flops)
    for mode, (steps, call_flops) in passes.items():
        if steps:
            flops = count.flops(workload.shape, mode)
            nbytes = count.moved_bytes(workload.shape, ITEMSIZE, mode)
            yield Work(workload, mode, flops, nbytes, _alone(steps, nbytes), _own(steps, flops, call_flops))


def _alone(steps: tuple[Step, ...], nbytes: int) -> tuple[Step, ...]:
    """Give a kernel that is the only one the workload's own bytes: it may read a few rows of a tensor."""
    return (steps[0].moving(nbytes),) if len(steps) == 1 else steps


def _own(steps: tuple[Step, ...], flops: int, call_flops: tuple[int, ...]) -> tuple[int, ...]:
    """Give the call the workload's own FLOPs: formulas see shapes alone, and count ragged lengths as the longest."""
    calls = {step.call for step in steps} - {None}
    return tuple(flops if {number} == calls else one for number, one in enumerate(call_flops))


def _composite(workload: Workload, target: Target) -> Iterator[Work]:
    """List a composite's kernels with folded weights, without gradients."""
    dtype = torch_dtype(DTYPE)
    with stored_configurations(used=True), listed(target) as listing:
        weights = make_weights(workload.case, dtype, "cuda")
        inputs = make_inputs(workload, dtype, "cuda")
        outs = _run(workload, dict(weights), inputs, listing)
        steps, call_flops = tuple(listing.steps), tuple(listing.flops)
    textbook = costs.flops(workload, inputs, weights, "forward")
    flops = costs.least_flops(workload, textbook, ITEMSIZE)
    nbytes = costs.moved_bytes(workload, inputs, weights, outs, "forward", itemsize=ITEMSIZE)
    yield Work(workload, "forward", flops, nbytes, steps, call_flops)


def _run(workload: Workload, weights: dict[str, Tensor], inputs: dict[str, Any], listing: Listing) -> Any:
    step = our_step(workload.case, weights)
    step.prepare(workload.op, inputs)
    listing.clear()
    with torch.no_grad():
        return getattr(step, workload.op)(**inputs)
