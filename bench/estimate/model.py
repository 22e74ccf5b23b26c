"""The estimate of a workload: each kernel's bytes over the bandwidth, or its FLOPs over the part of the peak it fills.

docs/estimates.md, which :mod:`bench.estimate.page` writes, states the formula and what it doesn't see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ..launches.record import Launch
from .collect import Work
from .compiled import Compiled
from .occupancy import Occupancy, resident
from .steps import Step


@dataclass(frozen=True)
class Ceilings:
    """A device as the estimate knows it.

    Attributes:
        name: short, as ``--device`` takes it.
        folder: of its records, in ``bench/results``.
        bandwidth: bytes a second.
        rate: FLOPs a second of 16-bit products.
        source: where the two are from.
    """

    name: str
    folder: str
    bandwidth: float
    rate: float
    source: str

    def roofline_s(self, flops: float, nbytes: float) -> float:
        """Return max(bytes / bandwidth, FLOPs / rate), seconds."""
        return max(nbytes / self.bandwidth, flops / self.rate)


DEVICES = {
    one.name: one
    for one in (
        Ceilings("h100", "nvidia-h100-80gb-hbm3", 3.03e12, 784e12, "measured ([h100.md](h100.md))"),
        Ceilings("h200", "nvidia-h200", 4.3e12, 790e12, "expected, not measured here"),
    )
}


@dataclass(frozen=True)
class Kernel:
    """A kernel with its share of the work.

    Attributes:
        step: as it was listed.
        flops: of its own.
        compiled: None for an operator of PyTorch, whose kernel is a library's.
    """

    step: Step
    flops: float
    compiled: Compiled | None

    @property
    def occupancy(self) -> Occupancy | None:
        """Return how it fills the GPU; None for a library's, whose grid isn't known."""
        if self.compiled is None or self.step.launch is None:
            return None
        return Occupancy(self.step.programs, resident(self.compiled.resources, self.step.launch.num_warps))

    @property
    def instructions(self) -> float | None:
        """Return the matrix instructions that its FLOPs need, all of its widest shape; None where it has none."""
        if self.compiled is None or self.compiled.matrix is None:
            return None
        return self.flops / (2 * prod(self.compiled.matrix))

    def seconds(self, device: Ceilings) -> float:
        """Estimate its time, without what a launch costs."""
        fill = 1.0 if self.occupancy is None else self.occupancy.fill
        return max(self.step.nbytes / device.bandwidth, self.flops / (device.rate * fill))


def kernels(work: Work, found: Mapping[Launch, Compiled]) -> list[Kernel]:
    """Give each kernel its FLOPs.

    An operator has its own. What is left of a call's belongs to its launches with matrix instructions, in equal
    parts; to its largest launch where none has any.

    Args:
        work: of a workload.
        found: every launch compiled.
    """
    steps, shares = work.steps, dict[int, float]()
    for call in {step.call for step in steps} - {None}:
        mine = [(number, step) for number, step in enumerate(steps) if step.call == call]
        left = work.call_flops[call] - sum(step.flops or 0 for _, step in mine)
        launches = [(number, step) for number, step in mine if step.launch is not None]
        able = [number for number, step in launches if found[step.launch].matrix is not None]
        if not able and launches:
            able = [max(launches, key=lambda one: one[1].programs)[0]]
        shares |= dict.fromkeys(able, max(0, left) / max(1, len(able)))
    return [
        Kernel(step, shares.get(number, 0.0) + (step.flops or 0), found[step.launch] if step.launch else None)
        for number, step in enumerate(steps)
    ]


def estimate_s(work: Sequence[Kernel], device: Ceilings, launch_s: float) -> float:
    """Estimate a workload's time in seconds: the sum over its kernels, and ``launch_s`` for each of them."""
    return sum(kernel.seconds(device) + launch_s for kernel in work)
