"""Contracts of ``hia::row_dot``."""

from __future__ import annotations

from hia_kernels.core.checks import FLOATS, Arg, Contract, like

check = Contract("row_dot", x=Arg("R C", FLOATS), y=like("x", "R C"))
