"""LayerNorm and the projection that follows it, in one pass over the input."""

from __future__ import annotations

from torch import Tensor

from ...core.call import call
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
        norm_weight: [C], dtype of ``x`` or fp32; either 16-bit float beside another.
        norm_bias:   [C], likewise.
        weight:      [D, C], dtype of ``x``.
        bias:        [D], dtype of ``x``, or None.
        row_idx:     [R] int64 in ``[0, T)``, or int32, which is converted; None takes every row in order. A row may be
            named twice. Values are checked on the CPU; elsewhere only with ``HIA_DEBUG=1``.
        eps:         added to the variance; not negative.

    Returns:
        [R, D] (or [T, D]), dtype of ``x``; differentiable in everything but ``row_idx`` and ``eps``.

    Raises:
        ValueError: shapes, devices, row indices or ``eps`` that don't fit. TypeError: unsupported or mixed dtypes.

    Cost: 2*R*C*D FLOPs; (R*C + D*C + R*D) * itemsize bytes.
    """
    return call("norm_linear", x, norm_weight, norm_bias, weight, bias, row_idx, eps)
