"""Verdicts on every target, those that are counted included."""

from __future__ import annotations

from collections.abc import Iterable

from ..records import targets
from ..records.record import Measurement
from ..records.targets import OURS, Target, Verdict


def judge(target: Target, records: Iterable[Measurement], device: str) -> Verdict:
    """Judge a target: by the records of its workload, or by formula where it is a ratio of FLOPs."""
    if target.kind == "flops":
        return targets.verdict(target, device, *layer_flops(int(target.case), device))
    return targets.judge(target, records, device)


def layer_flops(side: int, device: str) -> tuple[float, str]:
    """Count the HiA layers without the encoder, by the formulas that Table 3's counts are checked against.

    Returns:
        Ours over the released maths', and a note with both.
    """
    from ..table3 import formulas  # brings transformers, which takes seconds
    from ..table3.hosts import LLAVA_13B

    counts = [formulas.layers_flops(method, LLAVA_13B, side, 2, device) for method in (OURS, "released")]
    note = f"two images, {counts[0] / 1e12:.3g} and {counts[1] / 1e12:.3g} TFLOPs, by bench/table3/formulas.py"
    return counts[0] / counts[1], note
