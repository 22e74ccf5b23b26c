"""The paper's Table 3, to stand beside ours in every row.

Source: Ding, Chu, Pi, Wang, Li. "HiA: Towards Chinese Multimodal LLMs for Comparative High-Resolution Joint
Diagnosis", MICCAI 2024, Table 3 (memory in GB, FLOPs in T; x: out of memory).
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "Ding et al., HiA, MICCAI 2024, Table 3"
RESOLUTIONS = (448, 560, 672, 784, 896)
MEMORY_BOUND_GB = 30.4  # HiA's memory at 896 there


@dataclass(frozen=True)
class Figure:
    """One cell pair of the paper's table.

    Attributes:
        flops_t: "FLOPs (T)" as printed; the paper doesn't say whether FLOPs or multiply-adds.
        memory_gb: "Memory (GB)" as printed; None where the paper prints x.
    """

    flops_t: float
    memory_gb: float | None

    @property
    def out_of_memory(self) -> bool:
        """The paper prints x."""
        return self.memory_gb is None


TABLE3 = {
    ("baseline", 448): Figure(46.8, 30.8),
    ("baseline", 560): Figure(85.5, 31.3),
    ("baseline", 672): Figure(105.0, None),
    ("baseline", 784): Figure(162.0, None),
    ("baseline", 896): Figure(208.0, None),
    ("hia", 448): Figure(15.8, 29.6),
    ("hia", 560): Figure(16.2, 29.9),
    ("hia", 672): Figure(16.5, 30.1),
    ("hia", 784): Figure(16.7, 30.3),
    ("hia", 896): Figure(16.8, 30.4),
}


def figure(method: str, resolution: int) -> Figure | None:
    """The paper's figures, None where it has none."""
    return TABLE3.get((method, resolution))


def flops_ratio(resolution: int) -> float | None:
    """FLOPs of the baseline over HiA's, which no counting convention changes; None where the paper has none."""
    baseline, hia = figure("baseline", resolution), figure("hia", resolution)
    return baseline.flops_t / hia.flops_t if baseline and hia else None


def memory_ratio(resolution: int) -> float | None:
    """Memory of the baseline over HiA's; None where the paper has none or the baseline ran out of memory."""
    baseline, hia = figure("baseline", resolution), figure("hia", resolution)
    if baseline is None or hia is None or baseline.memory_gb is None or hia.memory_gb is None:
        return None
    return baseline.memory_gb / hia.memory_gb
