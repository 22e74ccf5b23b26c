"""What is recorded: every op at the GPU's workloads, and at the edges that its entry of :mod:`bench.workloads` names.

The only module here that knows where workloads and their inputs come from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hia_kernels
from bench.workloads import gpu_workloads, make_inputs, op_entry, ops
from hia_kernels.core import backend

from .device import Target
from .record import Recording, recorded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# rows of the tables that launch Triton kernels on a GPU, or may: the others are plain PyTorch
ROWS = ("triton", "cuda", "cudnn", "cublas")
# bf16 is recorded everywhere, these where they say: another dtype changes a kernel's code, another size seldom does.
# fp16 differs from bf16 by the names of its instructions.
FP16 = ("13b-896-2img:extract", "px896:stage3-3x3")
FP32 = (
    "px896", "px448:stage3-3x3", "px896:stage1-expand", "13b-896-2img", "13b-896-2img:extract", "13b-896-2img:inject",
    "13b-896-2img:queries", "13b-896-2img:visual", "13b-released-896-2img", "13b-released-896-2img:extract",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One op at one shape.

    Attributes:
        op: name of its table.
        name: of the workload or the edge.
        dtype: a key of :data:`DTYPES`.
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
        """Of op, workload and dtype."""
        return f"{self.op} {self.name} {self.dtype}"


def _workload_calls() -> Iterable[Call]:
    """Every op at its GPU set."""
    for workload in gpu_workloads():
        found = op_entry(workload.op)
        chosen = {"bf16": True, "fp16": workload.name in FP16, "fp32": workload.name in FP32}
        for dtype in (dtype for dtype in DTYPES if chosen[dtype]):

            def inputs(dtype: torch.dtype, workload: Any = workload) -> dict[str, Any]:
                return make_inputs(workload, dtype, "cuda")

            yield Call(workload.op, workload.name, dtype, inputs, found.inputs.DIFFERENTIABLE, found.public)


def _edge_calls() -> Iterable[Call]:
    """Every op at its edges."""
    for op in ops():
        found = op_entry(op)
        for edge in found.edges:

            def inputs(dtype: torch.dtype, make: Any = found.inputs.make_inputs, edge: Any = edge) -> dict[str, Any]:
                return make(edge.shape, dtype, "cuda")

            differentiable = found.inputs.DIFFERENTIABLE if edge.differentiable is None else edge.differentiable
            yield Call(op, edge.name, edge.dtype, inputs, differentiable, edge.function or found.public)


def calls(chosen: Iterable[str] = ()) -> list[Call]:
    """What is recorded.

    Args:
        chosen: names of ops; empty means every op.

    Raises:
        ValueError: no such op.
    """
    wanted = list(chosen) or list(ops())
    unknown = [op for op in wanted if op not in ops()]
    if unknown:
        raise ValueError(f"calls: ops must be among {', '.join(ops())}, got {', '.join(unknown)}")
    return [call for call in (*_workload_calls(), *_edge_calls()) if call.op in wanted]


def run(call: Call, recording: Recording) -> None:
    """Run forward, and forward and backward, by every row of the table that may launch a Triton kernel.

    Call it inside :func:`bench.launches.record.recorded`. A row that can't serve the call is noted as refused.
    """
    for row in backend.TABLES[call.op].backends:
        if row.name not in ROWS:
            continue
        recording.workload = f"{call.label} {row.name}"
        try:
            with hia_kernels.use_backend(row.name):
                _forward_backward(call)
        except NotImplementedError as error:
            recording.refused.append((recording.workload, str(error)))


def record(target: Target, ops: Iterable[str] = (), *, tuned: bool = False) -> Recording:
    """Record every call of :func:`calls` on a target.

    Args:
        target: of :data:`bench.launches.device.TARGETS`.
        ops: names of tables; empty means every op.
        tuned: with the configurations measured on such a device, where there are any; else the launchers' own.

    Raises:
        ValueError: no such op, or a grid beyond the device's limits. RuntimeError: ``TRITON_INTERPRET`` is set.
    """
    before = os.environ.get("HIA_TUNED")
    os.environ["HIA_TUNED"] = "1" if tuned else "0"
    try:
        with recorded(target) as recording:
            for call in calls(ops):
                run(call, recording)
    finally:
        if before is None:
            del os.environ["HIA_TUNED"]
        else:
            os.environ["HIA_TUNED"] = before
    return recording


def _forward_backward(call: Call) -> None:
    inputs, function = call.inputs(DTYPES[call.dtype]), call.function
    with torch.no_grad():
        function(**inputs)
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
