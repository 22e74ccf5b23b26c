"""Contracts of ``hia::norm_linear`` and its backward."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

import torch

from ...core import varlen
from ...core.checks import FLOATS, HALVES, INDEX_DTYPES, Arg, Contract, like

# a norm of an fp16 model keeps its weights under autocast to bf16; kernels read them in fp32 anyway
_NORMS = {dtype: (dtype, torch.float32, *HALVES) if dtype in HALVES else (dtype, torch.float32) for dtype in FLOATS}
_INPUTS = {
    "x": Arg("T C", FLOATS),
    "norm_weight": Arg("C", _NORMS, "x"),
    "norm_bias": Arg("C", _NORMS, "x"),
    "weight": like("x", "D C"),
}

_check = Contract(
    "norm_linear", **_INPUTS, bias=like("x", "D", optional=True), row_idx=Arg("R", INDEX_DTYPES, optional=True)
)
_check_rows_bwd = Contract("norm_linear_bwd", **_INPUTS, dout=like("x", "R D"), row_idx=Arg("R", INDEX_DTYPES))
_check_all_bwd = Contract("norm_linear_bwd", **_INPUTS, dout=like("x", "T D"))


def check(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of ``hia::norm_linear``, but for the row indices' values."""
    _check(arguments)
    _check_eps("norm_linear", arguments["eps"])


def check_bwd(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of ``hia::norm_linear_bwd``."""
    (_check_all_bwd if arguments["row_idx"] is None else _check_rows_bwd)(arguments)
    _check_eps("norm_linear_bwd", arguments["eps"])


def _check_eps(op: str, eps: float) -> None:
    if not 0 <= eps < inf:
        raise ValueError(f"hia::{op}: eps must be finite and not negative, got {eps}")


def check_values(op: str, x: torch.Tensor, row_idx: torch.Tensor | None, **rest: Any) -> None:
    """Check the row indices."""
    if row_idx is not None:
        varlen.check_row_idx(op, "row_idx", row_idx, x.shape[0], unique=False)
