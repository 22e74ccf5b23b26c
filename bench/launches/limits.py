"""The limits of a GPU, and what is expected of a compiled kernel on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .compile import REDUCED, Item, Resources
from .device import Target
from .record import Launch, Recording

# registers of a thread and of a block, CUDA C++ programming guide; CDNA 3: of a lane, which the waves of a SIMD share
REGISTERS, REGISTERS_OF_A_BLOCK, REGISTERS_OF_A_LANE = 255, 64 * 1024, 512


@dataclass(frozen=True)
class Waiver:
    """Launches that spill on one target, which is known, and stays; every other problem of theirs is one.

    Attributes:
        kernel: its name.
        target: a key of :data:`bench.launches.device.TARGETS`.
        constexprs: that the launch has, among others.
        dtype: Triton's word for it, of any pointer that the launch has.
        spilled: bytes that a thread may spill at most.
        reason: why it stays.
    """

    kernel: str
    target: str
    constexprs: Mapping[str, int]
    dtype: str
    spilled: int
    reason: str

    def covers(self, launch: Launch, target: Target) -> bool:
        """Tell whether it is about such a launch on such a target."""
        return (
            (self.kernel, self.target) == (launch.kernel, target.name)
            and self.constexprs.items() <= dict(launch.constexprs).items()
            and f"*{self.dtype}" in dict(launch.signature).values()
        )

    def without(self, found: Resources) -> Resources:
        """Return the resources less the spill that is waived; a larger one stays whole."""
        return replace(found, spilled=0) if found.spilled <= self.spilled else found


WAIVERS = (
    Waiver(
        "_norm_linear_bwd_dx_kernel",
        "sm_80",
        {"BLOCK_C": 16384, "HAS_IDX": True},
        "fp32",
        8,
        "x, dy and norm_weight are 32 values each in a thread of 128 registers",
    ),
    Waiver(
        "_cross_attention_scores_kernel",
        "sm_80",
        {"D": 272},
        "fp16",
        16,
        "272 is not a multiple of BLOCK_C and needs a mask of channels, which 512 and 640 do not",
    ),
    Waiver(
        "_cross_attention_values_kernel",
        "sm_100",
        {"IS_SPLIT": False, "HAS_LSE": True},
        "fp32",
        8,
        "64 x 64 sums in fp32 beside a product without matrix instructions",
    ),
)
# another instruction than the target's own: {kernel: {target: instruction}}
OTHER_MATRIX: dict[str, dict[str, str]] = {
    # 16 samples a tile: wgmma and tcgen05 take 64 rows at least, and the kernel streams the weight anyway
    "_condition_queries_fwd_kernel": {"sm_90": "mma.sync", "sm_100": "mma.sync"},
}


def waiver_of(launch: Launch, target: Target) -> Waiver | None:
    """Find the waiver of a launch on a target; None where there is none."""
    return next((waiver for waiver in WAIVERS if waiver.covers(launch, target)), None)


def register_limit(target: Target, num_warps: int) -> int:
    """Compute what a thread may have so that one block of the launch fits a multiprocessor."""
    if target.kind == "hip":
        return REGISTERS_OF_A_LANE // -(-num_warps // 4)
    return min(REGISTERS, REGISTERS_OF_A_BLOCK // (num_warps * target.warp))


def problems(launch: Launch, target: Target, found: Resources) -> list[str]:
    """List what breaks the target's limits; empty if nothing does."""
    if found.error:
        return [f"does not compile: {found.error}"]
    wrong = []
    if found.spilled:
        wrong.append(f"spills {found.spilled} bytes")
    if found.shared > target.shared:
        wrong.append(f"needs {found.shared} bytes of shared memory, has {target.shared}")
    limit = register_limit(target, launch.num_warps)
    if found.registers > limit:
        wrong.append(f"takes {found.registers} registers a thread, has {limit}")
    if found.reduced:
        wrong.append(f"multiplies in {REDUCED[target.kind]}")
    expected = OTHER_MATRIX.get(launch.kernel, {}).get(target.name, target.matrix)
    if found.dots[0] and not any(name.startswith(expected) for name in found.matrix):
        wrong.append(f"no {expected}, which a product of 16-bit operands should be")
    return wrong


def broken(recording: Recording, results: Mapping[Item, Resources], op: str = "") -> list[str]:
    """List what breaks a limit without a waiver, and waivers that nothing needs: kernel, target, problem, launch and
    workloads of each, on one line.

    Args:
        recording: of one target.
        results: of its launches.
        op: whose launches alone; empty means all.
    """
    lines = []
    for launch, uses in recording.launches.items():
        workloads = [workload for workload in uses.workloads if not op or workload.startswith(f"{op} ")]
        if not workloads:
            continue
        found, waiver = results[launch, recording.target.name], waiver_of(launch, recording.target)
        wrong = problems(launch, recording.target, waiver.without(found) if waiver else found)
        if waiver and not found.spilled and not found.error:
            wrong.append(f"needs no waiver any more ({waiver.reason})")
        if not wrong:
            continue
        lines.append(
            f"{launch.kernel} on {recording.target.name}: {', '.join(wrong)}; {launch.configuration}, "
            f"{launch.num_warps} warps, {launch.num_stages} stages; launched by {', '.join(workloads)}"
        )
    return lines
