"""LayerNorm and the projection that follows it, in one pass over the input."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.checks import FLOATS, check_devices, check_dtypes, check_shapes
from . import library as _library  # noqa: F401  (defines the op)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    row_idx: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise (selected) rows and project them: ``Linear(LayerNorm(x[row_idx]))``.

    The norms before HiA's projections of queries, features, visual tokens and extracted tokens (paper,
    section 3; norms as in the released code). Statistics in fp32.

    Args:
        x:           [T, C] fp32, fp16, bf16 or fp64; rows may be strided.
        norm_weight: [C], dtype of ``x`` or fp32.
        norm_bias:   [C], dtype of ``x`` or fp32.
        weight:      [D, C], dtype of ``x``.
        bias:        [D], dtype of ``x``, or None.
        row_idx:     [R] int64 in ``[0, T)``; None takes every row in order. A row may be named twice.
            Values are checked on the CPU; elsewhere only with ``HIA_DEBUG=1``.
        eps:         added to the variance.

    Returns:
        [R, D] (or [T, D]), dtype of ``x``; differentiable in everything but ``row_idx`` and ``eps``.

    Raises:
        ValueError: shapes, devices or row indices that don't fit. TypeError: unsupported or mixed dtypes.

    Cost: 2*R*C*D FLOPs; (R*C + D*C + R*D) * itemsize bytes.
    """
    op = "norm_linear"
    check_dtypes(op, x=(x, FLOATS))
    statistics = (x.dtype, torch.float32)
    check_dtypes(op, norm_weight=(norm_weight, statistics), norm_bias=(norm_bias, statistics))
    check_dtypes(op, weight=(weight, x.dtype), bias=(bias, x.dtype), row_idx=(row_idx, torch.int64))
    check_shapes(
        op,
        x=(x, "T C"),
        norm_weight=(norm_weight, "C"),
        norm_bias=(norm_bias, "C"),
        weight=(weight, "D C"),
        bias=(bias, "D"),
        row_idx=(row_idx, "R"),
    )
    check_devices(op, x=x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias, row_idx=row_idx)
    return torch.ops.hia.norm_linear(x, norm_weight, norm_bias, weight, bias, row_idx, eps)
