"""Contracts of ``hia::row_softmax``, ``hia::row_softmax_`` and their backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...core.checks import FLOATS, HALVES, Arg, Contract, check_choice

_SCORES = Arg("R N", FLOATS)

_check = Contract("row_softmax", scores=_SCORES)
check_inplace = Contract("row_softmax_", scores=_SCORES)
# the products before and behind may be wider than p
check_bwd = Contract("row_softmax_bwd", p=_SCORES, dp=_SCORES, dlse=Arg("R", FLOATS, optional=True))


def check(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of ``hia::row_softmax``."""
    _check(arguments)
    choices = FLOATS if arguments["scores"].dtype == torch.float64 else (torch.float32, *HALVES)
    check_choice("row_softmax", "out_dtype", arguments["out_dtype"], (None, *choices))
