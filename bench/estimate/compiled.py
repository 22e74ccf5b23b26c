"""Compiles listed launches, and reads what each takes of a multiprocessor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

from ..launches import compile as compiler
from ..launches.compile import Resources, compile_all
from ..launches.device import Target
from ..launches.record import Launch
from .occupancy import resident

_MATRIX = re.compile(r"(?:wgmma\.mma_async\.sync\.aligned|mma\.sync\.aligned)\.m(\d+)n(\d+)k(\d+)")


@dataclass(frozen=True)
class Compiled:
    """A compiled launch.

    Attributes:
        resources: that it takes of a multiprocessor.
        matrix: (m, n, k) of its widest matrix instruction; None where it has none.
    """

    resources: Resources
    matrix: tuple[int, int, int] | None


def widest(ptx: str) -> tuple[int, int, int] | None:
    """Find m, n and k of the matrix instruction with the most products; None where there is none."""
    shapes = {(int(m), int(n), int(k)) for m, n, k in _MATRIX.findall(ptx)}
    return max(shapes, key=prod, default=None)


def compiled(
    launches: Iterable[Launch], target: Target, jobs: int, progress: Callable[[int, int], None]
) -> dict[Launch, Compiled]:
    """Compile launches that Triton's cache doesn't hold.

    Args:
        launches: to compile.
        target: of :data:`bench.launches.device.TARGETS`.
        jobs: processes.
        progress: called with the number of kernels compiled and to be compiled, as one ends.

    Raises:
        RuntimeError: one does not compile, or does not fit a multiprocessor.
    """
    import triton

    items = [(launch, target.name) for launch in launches]
    # fresh: fills Triton's cache, which the PTX is read from
    results = compile_all(items, jobs=jobs, fresh=True, progress=progress)
    found = {}
    for (launch, _), resources in results.items():
        if resources.error:
            raise RuntimeError(f"bench estimate: {launch.kernel} does not compile: {resources.error}")
        if not resident(resources, launch.num_warps):
            raise RuntimeError(f"bench estimate: {launch.kernel} must fit a multiprocessor, got {resources}")
        source, options = compiler._source(launch), dict(launch.options)
        kernel = triton.compile(source, target=target.gpu_target(), options=options)
        found[launch] = Compiled(resources, widest(kernel.asm["ptx"]))
    return found
