"""The contract of ``row_dot``."""

from __future__ import annotations

import torch
from torch import Tensor

from hia_kernels.core.checks import FLOATS, check_devices, check_dtypes, check_shapes

from . import library as _library  # noqa: F401  (defines the op)


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """Multiply row by row: [R, C] and [R, C], one dtype -> [R], differentiable in both. Sums in fp32.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that don't fit.
    """
    op = "row_dot"
    check_dtypes(op, x=(x, FLOATS))
    check_dtypes(op, y=(y, x.dtype))
    check_shapes(op, x=(x, "R C"), y=(y, "R C"))
    check_devices(op, x=x, y=y)
    return torch.ops.hia.row_dot(x, y)
