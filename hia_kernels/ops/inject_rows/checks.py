"""Contracts of ``hia::inject_rows``, ``hia::inject_rows_`` and their backward."""

from __future__ import annotations

from typing import Any

import torch

from ...core import varlen
from ...core.checks import (
    FLOATS,
    HALVES,
    INDEX_DTYPES,
    SAME,
    Arg,
    Contract,
    like,
)

# autocast leaves the residual stream alone, and what it compiles calls the op without autocast
_UPDATES = {**SAME, torch.float32: (torch.float32, *HALVES), **dict.fromkeys(HALVES, HALVES)}
_PRODUCT = {"weight": like("update", "C D"), "row_idx": Arg("R", INDEX_DTYPES)}
_INPUTS = {
    "hidden": Arg("T C", FLOATS),
    "update": Arg("R D", _UPDATES, "hidden"),
    **_PRODUCT,
    "bias": like("update", "C", optional=True),
}

check = Contract("inject_rows", **_INPUTS)
check_inplace = Contract("inject_rows_", **_INPUTS)
check_bwd = Contract("inject_rows_bwd", dout=_INPUTS["hidden"], update=Arg("R D", _UPDATES, "dout"), **_PRODUCT)


def check_values(
    op: str, row_idx: torch.Tensor, hidden: torch.Tensor | None = None, dout: torch.Tensor | None = None, **rest: Any
) -> None:
    """Check the row indices, into hidden or, in the backward, into dout."""
    rows = hidden if dout is None else dout
    if rows is not None:
        varlen.check_row_idx(op, "row_idx", row_idx, rows.shape[0], unique=True)
