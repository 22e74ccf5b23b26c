"""Computes how a launch fills a GPU: programs resident on a multiprocessor, waves, and the fill of them all."""

from __future__ import annotations

from dataclasses import dataclass

from ..launches.compile import Resources

# a multiprocessor of sm_90: CUDA C++ programming guide, "technical specifications"; registers are given out in
# portions of 256 a warp, and a block's shared memory has 1 KiB more that the system keeps
MULTIPROCESSORS = 132  # of an H100 SXM and of an H200
REGISTERS, THREADS, BLOCKS, WARP = 64 * 1024, 2048, 32, 32
SHARED, RESERVED = 228 * 1024, 1024
REGISTERS_STEP = 8  # of a thread: 256 a warp


def resident(found: Resources, num_warps: int) -> int:
    """Compute the programs of a compiled kernel that a multiprocessor holds at once; 0 where not even one fits.

    Args:
        found: its registers a thread and bytes of shared memory a program.
        num_warps: of a program.
    """
    registers = -(-max(found.registers, 1) // REGISTERS_STEP) * REGISTERS_STEP
    threads = WARP * num_warps
    return min(BLOCKS, THREADS // threads, REGISTERS // (registers * threads), SHARED // (found.shared + RESERVED))


@dataclass(frozen=True)
class Occupancy:
    """A launch's programs, and the places that a GPU has for them.

    Attributes:
        programs: of its grid.
        resident: on a multiprocessor at once.
    """

    programs: int
    resident: int

    @property
    def waves(self) -> float:
        """Return how many times the GPU's places are taken: programs over the places of all multiprocessors."""
        return self.programs / (MULTIPROCESSORS * self.resident)

    @property
    def fill(self) -> float:
        """Return the part of the multiprocessors' time that has work if all programs take equally long.

        The busiest multiprocessor has ``ceil(programs / 132)`` of them, the average one ``programs / 132``. Programs
        that share a multiprocessor share its matrix units: how many are resident changes latency, not this.
        """
        share = self.programs / MULTIPROCESSORS
        return share / -(-self.programs // MULTIPROCESSORS)
