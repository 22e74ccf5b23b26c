"""Channels-last convolution with a folded norm, a residual and an activation."""

from __future__ import annotations

from torch import Tensor

from ...core.call import call
from . import library as _library  # noqa: F401  (defines the ops)


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    stride: int = 1,
    activation: str = "relu",
) -> Tensor:
    """Compute ``act(scale * conv(x) + shift + residual)`` on channels-last images; zero padding of ``K // 2``.

    A ResNet-50 step of the high-resolution encoder with its batch-norm folded into ``scale`` and ``shift``
    (a convolution's bias b goes into the shift as ``scale * b``). Scale, shift, residual and activation in
    fp32. NaN stays NaN, but for ReLU in the row ``cpu``, where oneDNN makes it 0 (docs/conv_norm_act.md).

    Args:
        x:        [N, IH, IW, C] fp32, fp16, bf16 or fp64.
        weight:   [OC, C, K, K], K 1 or 3, dtype of ``x`` (``nn.Conv2d``'s layout).
        scale:    [OC] fp32 (fp64 with fp64 ``x``).
        shift:    [OC], dtype of ``scale``.
        residual: [N, OH, OW, OC], dtype of ``x``, or None.
        stride:   1 or 2, in pixels; OH = (IH - 1) // stride + 1.
        activation: "none", "relu" or "gelu" (exact, with erf).

    Returns:
        [N, OH, OW, OC] contiguous, dtype of ``x``; differentiable in every tensor.

    Raises:
        ValueError: shapes, devices, stride or activation that don't fit. TypeError: unsupported or mixed dtypes.

    Cost: 2*N*OH*OW*OC*C*K*K FLOPs; (N*IH*IW*C + OC*C*K*K + N*OH*OW*OC) * itemsize bytes, and the residual's.
    """
    return call("conv_norm_act", x, weight, scale, shift, residual, stride, activation)
