"""Channels-last convolution with a folded norm, a residual and an activation."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.checks import FLOATS, check_choice, check_devices, check_dtypes, check_shapes
from . import library as _library  # noqa: F401  (defines the ops)

ACTIVATIONS = ("none", "relu", "gelu")


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
    fp32.

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
    op = "conv_norm_act"
    check_choice(op, "stride", stride, (1, 2))
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_dtypes(op, x=(x, FLOATS))
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_dtypes(op, weight=(weight, x.dtype), residual=(residual, x.dtype))
    check_dtypes(op, cast=False, scale=(scale, statistics), shift=(shift, statistics))
    dims = check_shapes(
        op,
        x=(x, "N IH IW C"),
        weight=(weight, "OC C K K"),
        scale=(scale, "OC"),
        shift=(shift, "OC"),
        residual=(residual, "N OH OW OC"),
    )
    check_devices(op, x=x, weight=weight, scale=scale, shift=shift, residual=residual)
    check_choice(op, "weight's K", dims["K"], (1, 3))
    if dims["IH"] < 1 or dims["IW"] < 1:
        raise ValueError(f"hia::{op}: x must hold at least one pixel, got shape {list(x.shape)}")
    if dims["C"] < 1 or dims["OC"] < 1:
        raise ValueError(f"hia::{op}: weight must have at least one channel in and out, got {list(weight.shape)}")
    if residual is not None:
        expected = [(dims["IH"] - 1) // stride + 1, (dims["IW"] - 1) // stride + 1]
        if [dims["OH"], dims["OW"]] != expected:
            raise ValueError(
                f"hia::{op}: residual must have the output's size {expected}, got {[dims['OH'], dims['OW']]}"
            )
    return torch.ops.hia.conv_norm_act(x, weight, scale, shift, residual, stride, activation)
