"""The contract of ``row_dot``."""

from __future__ import annotations

from torch import Tensor

from hia_kernels.core.call import call

from . import library as _library  # noqa: F401  (defines the op)


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """Multiply row by row: [R, C] and [R, C], one dtype -> [R], differentiable in both. Sums in fp32.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that don't fit.
    """
    return call("row_dot", x, y)
