"""Contracts of ``hia::condition_queries`` and its backward."""

from __future__ import annotations

from typing import Any

import torch

from ...core import varlen
from ...core.checks import FLOATS, INDEX_DTYPES, Arg, Contract, like

_INPUTS = {"hidden": Arg("T C", FLOATS), "row_idx": Arg("B", INDEX_DTYPES), "weight": like("hidden", "D C")}

check = Contract("condition_queries", **_INPUTS, bias=like("hidden", "D", optional=True), queries=like("hidden", "M D"))
check_bwd = Contract("condition_queries_bwd", **_INPUTS, dout=like("hidden", "B M D"))


def check_values(op: str, hidden: torch.Tensor, row_idx: torch.Tensor, **rest: Any) -> None:
    """Check the row indices."""
    varlen.check_row_idx(op, "row_idx", row_idx, hidden.shape[0], unique=False)
