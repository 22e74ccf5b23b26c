"""The small CPU set that guards against regressions, timed by ``make bench-compare`` and ``test_regression.py``.

Every op at its entry's regression shape in fp32, with the backward where the entry names what is trained, and the
composites of :mod:`bench.compare.worker`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import workloads
from . import worker as regression_worker

BOTH = ":both"  # behind an op's name: with its backward


def cases() -> tuple[str, ...]:
    """The names: ops, ops with their backward, composites."""
    trained = (f"{op}{BOTH}" for op in workloads.ops() if workloads.op_entry(op).trained)
    return (*workloads.ops(), *trained, *regression_worker.COMPOSITES)


def given(case: str) -> dict[str, Any]:
    """An op's "inputs" by name, and in which of them it is differentiated: "trained", empty for the forward alone."""
    op, _, both = case.partition(":")
    entry = workloads.op_entry(op)
    inputs = entry.inputs.make_inputs(entry.regression, torch.float32)
    return {"inputs": inputs, "trained": list(entry.trained) if both else []}


def make_call(case: str) -> regression_worker.Call:
    """What is timed: one call of the op or composite, or, behind ":both", one with its backward.

    Raises:
        ValueError: no such case.
    """
    if case not in cases():
        raise ValueError(f"bench.compare.regression: case must be among {', '.join(cases())}, got {case!r}")
    if case in regression_worker.COMPOSITES:
        return regression_worker.composite_call(case)
    return regression_worker.op_call(workloads.op_entry(case.partition(":")[0]).public, **given(case))


def write_inputs(path: Path, chosen: list[str]) -> None:
    """What the workers of ``bench.compare.run`` load: the ops' inputs, so that both revisions have the same."""
    torch.save({case: given(case) for case in chosen if case not in regression_worker.COMPOSITES}, path)
