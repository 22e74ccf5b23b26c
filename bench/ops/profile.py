"""Where the time of one call goes, op by op: ``python -m bench profile adapter_train_step 13b-released-896-2img``.

What a figure that falls short is explained by: own time of every op (on CUDA of its kernels) in one profiled call after
warm ones, for any provider of :mod:`bench.ops.run`, as a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hia_kernels.core.backend import last_backend

from ..measure.roofline import DTYPES
from ..providers.bound import Bound, both_call, dout_like
from ..providers.layers import make_weights
from ..providers.registry import all_providers
from ..records import environment
from ..workloads import Workload, composites, make_inputs, ops, workloads

WARM = 2  # calls before the profiled one: packing, caches, the C library's thresholds


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Checked flags; ``workload`` and ``device`` are what they name.

    Raises:
        SystemExit: a value that isn't allowed.
    """
    parser = argparse.ArgumentParser(prog="python -m bench profile", description="Where one call's time goes.")
    parser.add_argument("op", choices=(*ops(), *composites()), help="an op or a composite")
    parser.add_argument("case", help="one of its cases, as the tables of bench.ops.run name them")
    parser.add_argument("--role", default="", help="where the op has several (default: the first)")
    parser.add_argument("--provider", default="hia", metavar="NAME", help="(default: hia)")
    parser.add_argument("--mode", choices=("forward", "both"), help="(default: both for training steps)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: fp32, on CUDA bf16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="the largest (default: 16)")
    parser.add_argument("--shapes", action="store_true", help="a row for each op and shapes of its tensors")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: must be cpu here, got cuda: torch sees no CUDA device")
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    options.mode = options.mode or ("both" if options.op.endswith("train_step") else "forward")
    if options.rows < 1:
        parser.error(f"--rows: must be at least 1, got {options.rows}")
    found = {(workload.case.name, workload.role): workload for workload in workloads(options.op)}
    cases = dict(reversed(list(found)))  # the first role of each
    if options.case not in cases:
        parser.error(f"case: must be among {', '.join(dict.fromkeys(name for name, _ in found))}, got {options.case!r}")
    role = options.role or cases[options.case]
    if (options.case, role) not in found:
        roles = ", ".join(role for name, role in found if name == options.case)
        parser.error(f"--role: must be among {roles}, got {options.role!r}")
    options.workload = found[options.case, role]
    _check_provider(parser, options)
    return options


def _check_provider(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    providers = all_providers()
    able = [name for name, provider in providers.items() if provider.serves(options.workload)]
    if options.provider not in able:
        parser.error(f"--provider: must be among {', '.join(able)}, got {options.provider!r}")
    dtype = DTYPES[options.dtype]
    reason = providers[options.provider].unavailable_reason(options.device, dtype, options.workload, options.mode)
    if reason:
        parser.error(f"--provider: {options.provider} can't run here: {reason}")


def call_of(workload: Workload, provider: str, dtype: torch.dtype, device: str, mode: str) -> Callable[[], None]:
    """The workload as a call, with its inputs and weights made."""
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
    """Markdown: the largest own times, the rest in one line, and their sum."""
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    found = sorted(((getattr(event, own) / 1e3, event) for event in events), key=lambda pair: -pair[0])
    total = sum(ms for ms, _ in found)
    lines = ["| op | calls | ms | share |", "| --- | ---: | ---: | ---: |"]
    for ms, event in found[:rows]:
        name = f"`{event.key}`" + (f" {[shape for shape in event.input_shapes if shape]}" if shapes else "")
        lines.append(f"| {name} | {event.count} | {ms:,.1f} | {ms / max(total, 1e-9):.1%} |")
    rest = sum(ms for ms, _ in found[rows:])
    lines.append(f"| {max(0, len(found) - rows)} more | | {rest:,.1f} | {rest / max(total, 1e-9):.1%} |")
    return "\n".join([*lines, f"| together | | {total:,.1f} | |"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile and print.

    Returns:
        0.
    """
    options = parse(arguments)
    call = call_of(options.workload, options.provider, DTYPES[options.dtype], options.device, options.mode)
    for _ in range(WARM):
        call()
    start = time.perf_counter()
    call()
    plain = time.perf_counter() - start
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (options.device == "cuda")
    with profile(activities=activities, record_shapes=options.shapes) as record:
        call()
    print(table(record.key_averages(options.shapes), options.device, options.rows, shapes=options.shapes))
    facts = environment.describe(options.device, "bench.ops.profile")
    backend = last_backend(options.workload.op) if options.workload.level != "composite" else None
    print(
        f"\n{options.provider}{f' ({backend})' if backend else ''}, {options.mode}, {options.dtype}; "
        f"{1e3 * plain:,.1f} ms without the profiler: `{facts['command']}` at commit "
        f"{(facts['commit'] or 'unknown')[:12]}{' with changes' if facts['dirty'] else ''}, "
        f"{facts['device']}, {facts['threads']} threads, torch {facts['versions']['torch']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
