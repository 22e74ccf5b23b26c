"""A linear layer, by the fastest matrix product of the device."""

from __future__ import annotations

from torch import Tensor

from ...core.call import call
from . import library as _library  # noqa: F401  (defines the ops)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x weight^T + bias``: what no other op of HiA takes in, and plain products as ``linear(a, b.mT)``.

    Deterministic, on a CPU for one number of threads (docs/conventions.md, Bits); accumulation in fp32 (fp64 for fp64)
    as far as the device's library has it.

    Args:
        x:      [R, C] fp32, fp16, bf16 or fp64; any strides. ``R == 0`` is allowed.
        weight: [D, C], dtype of ``x``; any strides, best with rows or columns one after the other.
        bias:   [D], dtype of ``x``, or None.

    Returns:
        [R, D], dtype of ``x``; differentiable in everything.

    Raises:
        ValueError: shapes or devices that don't fit. TypeError: unsupported or mixed dtypes.

    Cost: 2*R*C*D FLOPs; (R*C + D*C + R*D) * itemsize bytes.
    """
    return call("linear", x, weight, bias)
