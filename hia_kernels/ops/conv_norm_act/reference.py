"""Reference of ``conv_norm_act`` in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _seen(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, int]:
    """Return what a convolution reads of x, and its stride over that.

    A 1 x 1 skips pixels by a slice: in the weight's gradient with a stride of 2, few channels and two threads oneDNN
    writes past its buffers (uxlfoundation/oneDNN#6035).
    """
    return (x[:, ::stride, ::stride], 1) if weight.shape[-1] == 1 else (x, stride)


def _conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve, channels last in and out; the result is in the statistics' dtype."""
    x, stride = _seen(x, weight, stride)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, stride=stride, padding=weight.shape[-1] // 2)
    return y.permute(0, 2, 3, 1).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


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


def _conv_bwd(dy: Tensor, x: Tensor, weight: Tensor, stride: int, output_mask: list[bool]) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight; those not in ``output_mask`` are empty."""
    whole = x
    x, stride_over_seen = _seen(x, weight, stride)
    width = x.shape[2]
    if x.dtype == torch.bfloat16 and width == 1:
        # with stride 2 oneDNN's gradient of the weight holds what memory held; a column of zeros changes nothing else
        x = F.pad(x, (0, 0, 0, stride_over_seen - 1))
    padding = [weight.shape[-1] // 2] * 2
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy.permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        weight,
        None,
        [stride_over_seen, stride_over_seen],
        padding,
        [1, 1],
        False,
        [0, 0],
        1,
        [*output_mask, False],
    )
    dweight = dweight.contiguous() if output_mask[1] else x.new_empty(0)
    if not output_mask[0]:
        return x.new_empty(0), dweight
    dx_seen = dx.permute(0, 2, 3, 1)[:, :, :width]
    dx = dx_seen.new_zeros(whole.shape)
    _seen(dx, weight, stride)[0].copy_(dx_seen)
    return dx, dweight


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
        dx, dweight = _conv_bwd((dz * scale).to(x.dtype), x, weight, stride, output_mask[:2])
    if output_mask[2]:
        dscale = (dz * y).sum((0, 1, 2))
    if output_mask[3]:
        dshift = dz.sum((0, 1, 2))
    if output_mask[4]:
        dresidual = dz.to(x.dtype, copy=True, memory_format=torch.contiguous_format)  # never dout itself
    return dx, dweight, dscale, dshift, dresidual
