"""Reference of ``conv_norm_act`` in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import onednn


def _conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve, channels last in and out; the result is in the statistics' dtype."""
    y = onednn.convolution(x, weight, stride)
    return y.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def conv_norm_act_ref(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: int,
    activation: str,
) -> Tensor:
    """Compute [N, IH, IW, C] -> [N, OH, OW, OC]."""
    z = _conv(x, weight, stride) * scale + shift
    if residual is not None:
        z = z + residual.to(z.dtype)
    if activation == "relu":
        z = F.relu(z)
    elif activation == "gelu":
        z = F.gelu(z)
    return z.to(x.dtype).contiguous()


def conv_norm_act_bwd_ref(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    out: Tensor,
    stride: int,
    activation: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, scale, shift, residual; those not in ``output_mask`` are empty.

    ``residual`` is read for "gelu" only; "relu" sees its sign in ``out``.
    """
    y = _conv(x, weight, stride) if output_mask[2] or activation == "gelu" else None
    dz = dout.to(scale.dtype)  # [N, OH, OW, OC]
    if activation == "relu":
        dz = torch.where(out > 0, dz, 0)
    elif activation == "gelu":
        z = y * scale + shift
        if residual is not None:
            z = z + residual.to(z.dtype)
        dz = torch.ops.aten.gelu_backward(dz, z)

    dx, dweight, dscale, dshift, dresidual = (x.new_empty(0) for _ in range(5))
    if output_mask[0] or output_mask[1]:
        grads = onednn.convolution_backward((dz * scale).to(x.dtype), x, weight, stride, output_mask[:2])
        dx, dweight = (x.new_empty(0) if grad is None else grad for grad in grads)
    if output_mask[2]:
        dscale = (dz * y).sum((0, 1, 2))
    if output_mask[3]:
        dshift = dz.sum((0, 1, 2))
    if output_mask[4]:
        dresidual = dz.to(x.dtype, copy=True, memory_format=torch.contiguous_format)  # never dout itself
    return dx, dweight, dscale, dshift, dresidual
