"""Compiles what a tuning will try, in parallel and before it: a GPU that waits for compilers is measured by nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

import hia_kernels
from hia_kernels.ops.conv_norm_act import inputs as convolution

from ..launches.compile import compile_all
from ..launches.device import TARGETS, Target, target_of
from ..launches.record import Launch, recorded
from ..launches.workloads import call_of, forward, forward_backward, rows_of, stored_configurations
from ..progress import Progress
from ..workloads import Workload
from .search import candidates, recording, using

Task = Workload | convolution.Shape


def launches_of(tasks: Iterable[Task], dtype: str, target: Target) -> list[Launch]:
    """Record what the candidates of every key that some tasks meet would launch on a target, each once.

    Args:
        tasks: ops at their workloads, or shapes of convolutions.
        dtype: of the inputs.
        target: of :data:`bench.launches.device.TARGETS`.
    """
    seen: set[str] = set()
    with stored_configurations(used=True), recorded(target) as found:
        for task in tasks:
            for call in _calls(task, dtype):
                _record(call, seen)
    return list(found.launches)


def _calls(task: Task, dtype: str) -> Iterable[Callable[[], None]]:
    """Return the task as calls, one a row of the table that launches Triton kernels."""
    call = call_of(task, dtype)
    for row in rows_of(call.op):

        def run(row: str = row) -> None:
            try:
                with hia_kernels.use_backend(row):
                    forward_backward(call) if isinstance(task, Workload) else forward(call)
            except NotImplementedError:  # the row can't serve the call, and will not be tried either
                return

        yield run


def _record(call: Callable[[], None], seen: set[str]) -> None:
    with recording() as keys, using({}):
        call()
    for name, heuristic in keys.items():
        if name in seen:
            continue
        seen.add(name)
        for config in candidates(name, heuristic)[1:]:
            with using({name: config}):
                call()


def compile_ahead(launches: Iterable[Launch], target: str, jobs: int | None = None) -> list[str]:
    """Compile into Triton's cache, where a launch on such a GPU finds it.

    Returns:
        What does not compile, and why; a tuning meets it again and leaves it out.
    """
    items = [(launch, target) for launch in launches]
    with Progress(len(items)) as progress:
        progress.step("compiling")
        results = compile_all(items, jobs=jobs, fresh=True, progress=lambda done, total: progress.done())
    failed = ((launch, found.error) for (launch, _), found in results.items() if found.error)
    return [f"{launch.kernel} {launch.configuration}: {error}" for launch, error in failed]


def print_compiled(tasks: Iterable[Task], dtype: str, jobs: int) -> None:
    """Compile what the tasks will try, where this GPU is one that launches can be recorded for."""
    target = target_of(torch.cuda.get_device_capability())
    if target is None:
        return
    launches = launches_of(tasks, dtype, TARGETS[target])
    print(f"compiling {len(launches)} kernels with {jobs} processes", flush=True)
    for problem in compile_ahead(launches, target, jobs):
        print(f"does not compile: {problem.partition(chr(10))[0]}")
