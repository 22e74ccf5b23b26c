"""``python -m bench profile adapter_train_step 13b-released-896-2img``: where the time of one call goes, op by op.

What a target that is missed is explained by: own time of every op (on CUDA of its kernels) in one profiled call after
warm ones, for any provider of ``bench ops``, as a Markdown table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hia_kernels.core.backend import last_backend

from ..cli import BadOption, device_of, one_of
from ..providers.bound import Bound, both_call, dout_like
from ..providers.layers import make_weights
from ..providers.registry import all_providers
from ..records import environment, markdown
from ..records.devices import DEFAULT_DTYPE, DTYPES, torch_dtype
from ..workloads import Workload, composites, make_inputs, ops, workloads

WARM = 2  # calls before the profiled one: packing, caches, the C library's thresholds
MODES = ("forward", "both")


@dataclass(frozen=True)
class Choice:
    """A choice of what is profiled.

    Attributes:
        workload: op and case.
        provider: its name.
        mode: "forward" or "both".
        dtype: its name.
        device: "cpu" or "cuda".
    """

    workload: Workload
    provider: str
    mode: str
    dtype: str
    device: str


def choose(op: str, case: str, *, role: str, provider: str, mode: str | None, dtype: str | None, device: str) -> Choice:
    """Check what is asked for.

    Raises:
        BadOption: an unknown name, or a provider that can't run here.
    """
    op = one_of("op", op, (*ops(), *composites()))
    device = device_of(device)
    dtype = one_of("--dtype", dtype or DEFAULT_DTYPE[device], DTYPES)
    mode = one_of("--mode", mode or ("both" if op.endswith("train_step") else "forward"), MODES)
    found = {(workload.case.name, workload.role): workload for workload in workloads(op)}
    case = one_of("case", case, dict.fromkeys(name for name, _ in found))
    roles = [own for name, own in found if name == case]
    workload = found[case, one_of("--role", role, roles) if role else roles[0]]
    providers = all_providers()
    provider = one_of("--provider", provider, [name for name, one in providers.items() if one.serves(workload)])
    reason = providers[provider].unavailable_reason(device, torch_dtype(dtype), workload, mode)
    if reason:
        raise BadOption(f"--provider: must be one that can run here, got {provider}: {reason}")
    return Choice(workload, provider, mode, dtype, device)


def call_of(workload: Workload, provider: str, dtype: torch.dtype, device: str, mode: str) -> Callable[[], None]:
    """Return the workload as a call, with its inputs and weights made."""
    inputs = make_inputs(workload, dtype, device)
    weights = make_weights(workload.case, dtype, device) if workload.level == "composite" else None
    gradients = mode == "both"
    bound: Bound = all_providers()[provider].bind(workload, inputs, weights, gradients=gradients)

    with torch.set_grad_enabled(gradients):
        work = both_call(bound, dout_like(bound.forward())) if gradients else bound.forward

    def call() -> None:
        bound.restore()
        with torch.set_grad_enabled(gradients):
            work()
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def table(events: Sequence[Any], device: str, rows: int, *, shapes: bool) -> str:
    """Return the largest own times as Markdown, the rest in one line, and their sum."""
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    if device == "cuda":  # an op's own time on the device is its kernels', which have rows of their own
        events = [event for event in events if event.device_type == DeviceType.CUDA]
    found = sorted(((getattr(event, own) / 1e3, event) for event in events), key=lambda pair: -pair[0])
    total = sum(ms for ms, _ in found)
    rest = sum(ms for ms, _ in found[rows:])
    lines: list[tuple[Any, ...]] = []
    for ms, event in found[:rows]:
        name = f"`{event.key}`" + (f" {[shape for shape in event.input_shapes if shape]}" if shapes else "")
        lines.append((name, event.count, f"{ms:,.4g}", f"{ms / max(total, 1e-9):.1%}"))
    lines.append((f"{max(0, len(found) - rows)} more", "", f"{rest:,.4g}", f"{rest / max(total, 1e-9):.1%}"))
    lines.append(("together", "", f"{total:,.4g}", ""))
    return "\n".join(markdown.table(("op", "calls", "ms", "share"), lines))


def run(choice: Choice, *, rows: int, shapes: bool) -> str:
    """Profile a call.

    Returns:
        The table, and where it was made.
    """
    call = call_of(choice.workload, choice.provider, torch_dtype(choice.dtype), choice.device, choice.mode)
    for _ in range(WARM):
        call()
    start = time.perf_counter()
    call()
    plain = time.perf_counter() - start
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (choice.device == "cuda")
    with profile(activities=activities, record_shapes=shapes) as record:
        call()
    facts = environment.describe(choice.device)
    backend = last_backend(choice.workload.op) if choice.workload.level != "composite" else None
    return (
        f"{table(record.key_averages(shapes), choice.device, rows, shapes=shapes)}\n\n"
        f"{choice.provider}{f' ({backend})' if backend else ''}, {choice.mode}, {choice.dtype}; "
        f"{1e3 * plain:,.4g} ms without the profiler: {environment.line_of(facts)}"
    )
