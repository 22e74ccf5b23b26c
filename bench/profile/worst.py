"""The rows of ours that are furthest from their roofline, to be profiled."""

from __future__ import annotations

from pathlib import Path

from ..records import environment
from ..records.record import Measurement
from ..records.resume import standing
from ..records.store import earlier_records
from ..records.targets import OURS
from .run import Choice, choose

FILES = ("targets.json", "kernels.json")
# where nothing was measured: the slowest beside their roofline when they were measured last (docs/h100.md)
UNMEASURED = {
    "cuda": (("encode", "px896"), ("adapter_layer", "13b-released-896-2img"), ("cross_attention", "13b-896:extract")),
    "cpu": (("row_softmax", "tiny"),),
}


def worst(folder: Path, device: str, count: int) -> list[Choice]:
    """Choose what to profile by the records of this commit on this device, else by a list.

    A backward is profiled with its forward: its kernels have rows of their own in the table.

    Args:
        folder: of the records.
        device: "cpu" or "cuda".
        count: of rows, at most.
    """
    facts = environment.describe(device)
    records = [row for name in FILES for row in standing(earlier_records(folder / name), facts)]
    own = [row for row in records if row.provider == OURS and row.percent_of_roofline is not None]
    own.sort(key=lambda row: row.percent_of_roofline or 0.0)
    ranked = {(row.op, row.case, _mode(row), row.dtype): None for row in own}
    if not ranked:
        return [_choice(op, case, None, None, device) for op, case in UNMEASURED[device]][:count]
    return [_choice(op, case, mode, dtype, device) for op, case, mode, dtype in [*ranked][:count]]


def _mode(row: Measurement) -> str:
    return "forward" if row.mode == "forward" else "both"


def _choice(op: str, case: str, mode: str | None, dtype: str | None, device: str) -> Choice:
    name, _, role = case.partition(":")
    return choose(op, name, role=role, provider=OURS, mode=mode, dtype=dtype, device=device)
