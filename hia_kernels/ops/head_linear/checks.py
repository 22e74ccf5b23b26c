"""Contracts of ``hia::head_linear`` and its backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...core.checks import FLOATS, Arg, Contract, like

_INPUTS = {"x": Arg("n H R C", FLOATS), "weight": like("x", "H D C")}

check = Contract("head_linear", **_INPUTS)
_check_bwd = Contract("head_linear_bwd", **_INPUTS, dout=like("x", "n H R D"))
_check_merged_bwd = Contract("head_linear_bwd", **_INPUTS, dout=like("x", "n R H*D"))


def check_bwd(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of ``hia::head_linear_bwd``."""
    if not arguments["merge_heads"]:
        _check_bwd(arguments)
        return
    sizes = _check_merged_bwd(arguments)
    if sizes["H*D"] != sizes["H"] * sizes["D"]:
        raise ValueError(
            f"hia::head_linear_bwd: dout must have shape [n, R, {sizes['H']} * {sizes['D']}], the heads merged,"
            f" got {list(arguments['dout'].shape)}"
        )
