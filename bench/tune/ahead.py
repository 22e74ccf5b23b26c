"""Compiles what a tuning will try, in parallel and before it: a GPU that waits for compilers is measured by nobody."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import hia_kernels
from hia_kernels.ops.conv_norm_act import inputs as convolution

from ..launches.compile import compile_all
from ..launches.device import TARGETS, Target
from ..launches.record import Launch, recorded
from ..launches.workloads import ROWS, call_of, forward, forward_backward
from ..progress import Progress
from ..workloads import Workload
from .search import Tuned, candidates, recording, using

Task = Workload | convolution.Shape


def target_of(capability: tuple[int, int]) -> str | None:
    """Name the target of a CUDA capability; None where kernels are recorded for no such GPU."""
    name = f"sm_{capability[0]}{capability[1]}"
    return name if name in TARGETS else None


def launches_of(tasks: Iterable[Task], dtype: str, target: Target, known: Tuned | None = None) -> list[Launch]:
    """Record what the candidates of every key that some tasks meet would launch on a target, each once.

    Args:
        tasks: ops at their workloads, or shapes of convolutions.
        dtype: of the inputs.
        target: of :data:`bench.launches.device.TARGETS`.
        known: configurations that are taken where a key is not being tried.
    """
    before, kept = os.environ.get("HIA_TUNED"), {} if known is None else known.configurations
    os.environ["HIA_TUNED"] = "1"
    seen: set[str] = set()
    try:
        with recorded(target) as found:
            for task in tasks:
                for call in _calls(task, dtype):
                    _record(call, kept, seen)
            return list(found.launches)
    finally:
        if before is None:
            del os.environ["HIA_TUNED"]
        else:
            os.environ["HIA_TUNED"] = before


def _calls(task: Task, dtype: str) -> Iterable[Callable[[], None]]:
    """Return the task as calls, one a row of the table that launches Triton kernels."""
    call = call_of(task, dtype)
    for row in ROWS:

        def run(row: str = row) -> None:
            try:
                with hia_kernels.use_backend(row):
                    forward_backward(call) if isinstance(task, Workload) else forward(call)
            except NotImplementedError:  # the row can't serve the call, and will not be tried either
                return

        if hia_kernels.core.backend.TABLES[call.op].row(row) is not None:
            yield run


def _record(call: Callable[[], None], known: dict[str, dict[str, int]], seen: set[str]) -> None:
    with recording() as keys, using(known):
        call()
    for name, heuristic in keys.items():
        if name in seen:
            continue
        seen.add(name)
        for config in candidates(name, heuristic)[1:]:
            with using({**known, name: config}):
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
