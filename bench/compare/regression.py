"""The small CPU set that guards against regressions, timed by ``make bench-compare`` and ``test_regression.py``.

Every op at its entry's regression shape in fp32, with the backward where the entry names what is trained, and the
composites of :mod:`bench.compare.worker`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .. import workloads
from . import worker

BOTH = ":both"  # behind an op's name: with its backward


def cases() -> tuple[str, ...]:
    """List the names: ops, ops with their backward, composites."""
    trained = (f"{op}{BOTH}" for op in workloads.ops() if workloads.op_entry(op).trained)
    return (*workloads.ops(), *trained, *worker.COMPOSITES)


def given(case: str) -> dict[str, Any]:
    """Return an op's "inputs" by name, and "trained": those it is differentiated in, none for the forward alone."""
    op, _, both = case.partition(":")
    entry = workloads.op_entry(op)
    inputs = entry.inputs.make_inputs(entry.regression, torch.float32)
    return {"inputs": inputs, "trained": list(entry.trained) if both else []}


def make_call(case: str) -> worker.Call:
    """Return what is timed: one call of the op or composite, or, behind ":both", one with its backward.

    Raises:
        ValueError: no such case.
    """
    if case not in cases():
        raise ValueError(f"bench compare: case must be among {', '.join(cases())}, got {case!r}")
    if case in worker.COMPOSITES:
        return worker.composite_call(case)
    return worker.op_call(workloads.op_entry(case.partition(":")[0]).public, **given(case))


def write_inputs(path: Path, chosen: Iterable[str]) -> None:
    """Write what the workers load: the ops' inputs, so that both revisions have the same."""
    torch.save({case: given(case) for case in chosen if case not in worker.COMPOSITES}, path)
