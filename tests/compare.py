"""The only tolerance policy of the repository; the benchmarks ask the same :func:`bench.tolerance.mismatch`."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.tolerance import UNIT_ROUNDOFF, mismatch, rel_rms, worst_index

__all__ = ["UNIT_ROUNDOFF", "assert_close", "rel_rms", "worst_index"]


def assert_close(name: str, out: Tensor, exact: Tensor, plain: Tensor, *, dtype: torch.dtype, slack: float = 2) -> None:
    """``out`` may be twice as wrong as plain PyTorch at the same dtype is, and ``slack`` roundings more.

    Args:
        name: of the tensor, for the message.
        out: what is tested.
        exact: the reference in higher precision.
        plain: the same reference run at ``dtype``.
        dtype: the dtype it was computed in.
        slack: in unit roundoffs of ``dtype``.
    """
    problem = mismatch(name, out, exact, plain, dtype=dtype, slack=slack)
    assert problem is None, problem
