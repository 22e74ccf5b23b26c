"""Contracts of ``hia::linear`` and its backward."""

from __future__ import annotations

from ...core.checks import FLOATS, Arg, Contract, like

_X, _WEIGHT = Arg("R C", FLOATS), like("x", "D C")

check = Contract("linear", x=_X, weight=_WEIGHT, bias=like("x", "D", optional=True))
check_bwd = Contract("linear_bwd", x=_X, weight=_WEIGHT, dout=like("x", "R D"))
