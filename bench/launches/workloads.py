"""The calls that are recorded: every op and composite at the GPU's workloads, and ops at their entries' edges.

The only module here that knows where workloads and their inputs come from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

import hia_kernels
from bench.providers.layers import make_weights, our_step
from bench.records.devices import torch_dtype
from bench.workloads import (
    Workload,
    composite_entry,
    composites,
    gpu_workloads,
    in_set,
    make_inputs,
    op_entry,
    ops,
    workloads,
)
from hia_kernels.core import backend
from hia_kernels.ops.conv_norm_act import inputs as convolution

from .device import TARGETS, Target
from .record import Recording, recorded

# rows of the tables that launch Triton kernels on a GPU, or may: the others are plain PyTorch
ROWS = ("triton", "cudnn", "cublas")
OTHERS_ALONE = {"cross_attention": ("cudnn",)}  # rows of that name which launch nothing of ours
CHOSEN = "chosen"  # in place of a row: a composite's ops run what their tables choose


@dataclass(frozen=True)
class Call:
    """One op at one shape.

    Attributes:
        op: name of its table.
        name: of the workload or the edge.
        dtype: a key of :data:`bench.records.devices.DTYPES`.
        inputs: makes the arguments by name, on the fake device.
        differentiable: arguments whose gradients are recorded as well; none where it is empty.
        function: what is called.
    """

    op: str
    name: str
    dtype: str
    inputs: Callable[[torch.dtype], dict[str, Any]]
    differentiable: tuple[str, ...]
    function: Callable[..., Any]

    @property
    def label(self) -> str:
        """Name op, workload and dtype."""
        return f"{self.op} {self.name} {self.dtype}"


@dataclass(frozen=True)
class CompositeCall:
    """One composite at one case, in bf16: with folded weights, or differentiated where it is a training step.

    Attributes:
        workload: the composite and its case.
    """

    workload: Workload
    dtype = "bf16"

    @property
    def op(self) -> str:
        """Name of the composite."""
        return self.workload.op

    @property
    def label(self) -> str:
        """Name composite, workload and dtype."""
        return f"{self.op} {self.workload.name} {self.dtype}"


def _workload_calls() -> Iterable[Call]:
    """List every op at its GPU set.

    In bf16 all of it, in the other dtypes the first workload of each role: another dtype changes a kernel's code,
    another size seldom does. Where it does, the op's entry has an edge.
    """
    seen = set()
    for workload in gpu_workloads():
        role = (workload.op, workload.role)
        for dtype in ("bf16",) if role in seen else ("bf16", "fp16", "fp32"):
            yield call_of(workload, dtype)
        seen.add(role)


def call_of(task: Workload | convolution.Shape, dtype: str) -> Call:
    """Return the call of an op's workload, or of a convolution that belongs to none."""
    op = "conv_norm_act" if isinstance(task, convolution.Shape) else task.op
    found = op_entry(op)

    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        if isinstance(task, convolution.Shape):
            return convolution.make_inputs(task, dtype, "cuda")
        return make_inputs(task, dtype, "cuda")

    name = str(task) if isinstance(task, convolution.Shape) else task.name
    return Call(op, name, dtype, inputs, found.inputs.DIFFERENTIABLE, found.public)


def _edge_calls() -> Iterable[Call]:
    """List every op at its edges."""
    for op in ops():
        found = op_entry(op)
        for edge in found.edges:

            def inputs(dtype: torch.dtype, make: Any = found.inputs.make_inputs, edge: Any = edge) -> dict[str, Any]:
                return make(edge.shape, dtype, "cuda")

            differentiable = found.inputs.DIFFERENTIABLE if edge.differentiable is None else edge.differentiable
            yield Call(op, edge.name, edge.dtype, inputs, differentiable, edge.function or found.public)


def _composite_calls() -> Iterable[CompositeCall]:
    """List every composite at its GPU set."""
    for composite in composites():
        yield from (CompositeCall(workload) for workload in workloads(composite) if in_set(workload, "gpu"))


def calls(chosen: Iterable[str] = ()) -> list[Call | CompositeCall]:
    """List the calls that are recorded.

    Args:
        chosen: names of ops and composites; empty means all.

    Raises:
        ValueError: no such op or composite.
    """
    known = (*ops(), *composites())
    wanted = list(chosen) or list(known)
    unknown = [op for op in wanted if op not in known]
    if unknown:
        raise ValueError(f"calls: ops must be among {', '.join(known)}, got {', '.join(unknown)}")
    found: list[Call | CompositeCall] = [*_workload_calls(), *_edge_calls(), *_composite_calls()]
    return [call for call in found if call.op in wanted]


def run(call: Call | CompositeCall, recording: Recording) -> None:
    """Run an op forward, and forward and backward, by every row of the table that may launch a Triton kernel; a
    composite as it is measured, by the rows that the tables choose.

    Call it inside :func:`bench.launches.record.recorded`. A row that can't serve the call is noted as refused.
    """
    if isinstance(call, CompositeCall):
        recording.workload = f"{call.label} {CHOSEN}"
        _step(call)
        return
    for row in rows_of(call.op):
        recording.workload = f"{call.label} {row}"
        try:
            with hia_kernels.use_backend(row):
                forward_backward(call)
        except NotImplementedError as error:
            recording.refused.append((recording.workload, str(error)))


def rows_of(op: str) -> list[str]:
    """List the rows of an op's table that launch Triton kernels, or may."""
    names = [row.name for row in backend.TABLES[op].backends]
    return [name for name in names if name in ROWS and name not in OTHERS_ALONE.get(op, ())]


def record(target: Target, ops: Iterable[str] = (), *, tuned: bool = False) -> Recording:
    """Record every call of :func:`calls` on a target.

    Args:
        target: of :data:`bench.launches.device.TARGETS`.
        ops: names of ops and composites; empty means all.
        tuned: with the configurations measured on such a device, where there are any; else the launchers' own.

    Raises:
        ValueError: no such op or composite, or a grid beyond the device's limits.
        RuntimeError: ``TRITON_INTERPRET`` is set.
    """
    with stored_configurations(used=tuned), recorded(target) as recording:
        for call in calls(ops):
            run(call, recording)
    return recording


@contextmanager
def stored_configurations(*, used: bool) -> Iterator[None]:
    """Have launchers take what was measured on a device inside the block, or their own configurations."""
    before = os.environ.get("HIA_TUNED")
    os.environ["HIA_TUNED"] = "1" if used else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HIA_TUNED"]
        else:
            os.environ["HIA_TUNED"] = before


def record_all(names: Sequence[str], jobs: int | None = None) -> dict[str, Recording]:
    """Record every call on several targets, each in a process of its own.

    Args:
        names: keys of :data:`bench.launches.device.TARGETS`.
        jobs: processes at once; None means one a core.
    """
    jobs = jobs or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(min(jobs, len(names)), mp_context=get_context("spawn")) as pool:
        return dict(zip(names, pool.map(record, [TARGETS[name] for name in names])))


@lru_cache(maxsize=64)
def _weights(case: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make a case's weights, which have no values: seven composites share them."""
    return make_weights(case, dtype, "cuda")


def _step(call: CompositeCall) -> None:
    workload, dtype = call.workload, torch_dtype(call.dtype)
    step = our_step(workload.case, dict(_weights(workload.case, dtype)))
    inputs = make_inputs(workload, dtype, "cuda")
    if not composite_entry(call.op).trains:
        step.prepare(call.op, inputs)
        with torch.no_grad():
            getattr(step, call.op)(**inputs)
        return
    leaves = [parameter for parameter in step.parameters() if parameter.requires_grad]
    if "hidden" in inputs:
        inputs["hidden"] = inputs["hidden"].detach().requires_grad_()
        leaves.append(inputs["hidden"])
    outputs = getattr(step, call.op)(**inputs)
    torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs], allow_unused=True)


def forward(call: Call) -> dict[str, Any]:
    """Run an op without gradients; return what it was given."""
    inputs = call.inputs(torch_dtype(call.dtype))
    with torch.no_grad():
        call.function(**inputs)
    return inputs


def forward_backward(call: Call) -> None:
    """Run an op forward without gradients, then with those of its differentiable arguments."""
    inputs, function = forward(call), call.function
    leaves = {name: inputs[name].detach().requires_grad_() for name in call.differentiable if _is_leaf(inputs[name])}
    if not leaves:
        return
    inputs |= leaves
    results = function(**inputs)
    outputs = [out for out in (results if isinstance(results, tuple) else (results,)) if _has_gradient(out)]
    torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(out) for out in outputs])


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
