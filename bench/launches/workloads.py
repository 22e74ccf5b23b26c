"""What is recorded: every op at the GPU's workloads, and at shapes that no workload has (:mod:`bench.launches.edges`).

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
from bench.cases import OPS, in_set, workloads
from bench.inputs import DIFFERENTIABLE, make_inputs
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
        function: what is called; None means the function of :mod:`hia_kernels` that has the op's name.
    """

    op: str
    name: str
    dtype: str
    inputs: Callable[[torch.dtype], dict[str, Any]]
    differentiable: tuple[str, ...]
    function: Callable[..., Any] | None = None

    @property
    def label(self) -> str:
        """Of op, workload and dtype."""
        return f"{self.op} {self.name} {self.dtype}"


def _workload_calls() -> Iterable[Call]:
    """Every op at its GPU set."""
    for op in OPS:
        for workload in workloads(op):
            if not in_set(workload, "gpu"):
                continue
            chosen = {"bf16": True, "fp16": workload.name in FP16, "fp32": workload.name in FP32}
            for dtype in (dtype for dtype in DTYPES if chosen[dtype]):

                def inputs(dtype: torch.dtype, workload: Any = workload) -> dict[str, Any]:
                    return make_inputs(workload, dtype, "cuda")

                yield Call(op, workload.name, dtype, inputs, DIFFERENTIABLE[op])


def calls(ops: Iterable[str] = ()) -> list[Call]:
    """What is recorded.

    Args:
        ops: names of tables; empty means every op.

    Raises:
        ValueError: no such op.
    """
    from .edges import edge_calls

    wanted = list(ops) or list(OPS)
    unknown = [op for op in wanted if op not in OPS]
    if unknown:
        raise ValueError(f"calls: ops must be among {', '.join(OPS)}, got {', '.join(unknown)}")
    return [call for call in (*_workload_calls(), *edge_calls()) if call.op in wanted]


def run(call: Call, recording: Recording) -> None:
    """Run forward, and forward and backward, by every row of the table that may launch a Triton kernel.

    Call it inside :func:`bench.launches.record.recorded`. A row that can't serve the call is noted as refused.
    """
    function = call.function or getattr(hia_kernels, call.op)
    for row in backend.TABLES[call.op].backends:
        if row.name not in ROWS:
            continue
        recording.workload = f"{call.label} {row.name}"
        try:
            with hia_kernels.use_backend(row.name):
                _forward_backward(function, call)
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


def _forward_backward(function: Callable[..., Any], call: Call) -> None:
    inputs = call.inputs(DTYPES[call.dtype])
    with torch.no_grad():
        function(**inputs)
    named = [inputs[name] for name in call.differentiable if inputs[name] is not None]
    leaves = [tensor.requires_grad_() for tensor in named]
    if not leaves:
        return
    results = function(**inputs)
    outputs = [out for out in (results if isinstance(results, tuple) else (results,)) if _has_gradient(out)]
    torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs])


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
