"""``conv_norm_act`` on the CPU: oneDNN's convolution with bias, residual and activation fused behind it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED = {"none": ("none", None), "relu": ("relu", None), "gelu": ("gelu", "none")}  # oneDNN's name and algorithm
LONGEST_SUM = 2**13  # outputs that one call adds up for a weight's gradient


def unavailable_reasons() -> list[str]:
    """Why this build of torch can't run it."""
    return [] if torch.backends.mkldnn.is_available() else ["torch was built without oneDNN"]


def unsupported_reasons(first: Tensor, *rest: Any) -> list[str]:
    """``first`` is an image, a residual, a weight or the incoming gradient: all have one device and dtype."""
    found = []
    if first.device.type != "cpu":
        found.append(f"tensors must be on the CPU, got {first.device}")
    if first.dtype not in (torch.float32, torch.bfloat16):
        found.append(f"{str(first.dtype).removeprefix('torch.')} is left to the reference")
    if first.dtype == torch.bfloat16:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            found.append("bfloat16 needs AVX-512 here")
        if rest and isinstance(rest[-1], list) and rest[-2] == "gelu":
            found.append("gelu's backward in bfloat16 is left to the reference")
    return found


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight * scale[:, None, None, None]).to(weight.dtype)


def pack_weight(weight: Tensor, scale: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Scale a weight and lay it out as oneDNN wants it for images of ``size``; others are correct too, and slow."""
    padding, image = [weight.shape[-1] // 2] * 2, [1, weight.shape[1], *size]
    return torch.ops.mkldnn._reorder_convolution_weight(
        _scaled(weight, scale).contiguous(), padding, [stride] * 2, [1, 1], 1, image
    )


def _geometry(weight: Tensor, stride: int, pad_rows: bool) -> tuple[list[int], list[int], list[int], int]:
    pad = weight.shape[-1] // 2
    return [pad if pad_rows else 0, pad], [stride, stride], [1, 1], 1


def conv_norm_act_packed(
    x: Tensor, weight: Tensor, shift: Tensor, residual: Tensor | None, stride: int, activation: str, pad_rows: bool
) -> Tensor:
    """[N, IH, IW, C] -> [N, OH, OW, OC], the scale folded into ``weight``, which may be packed."""
    geometry = _geometry(weight, stride, pad_rows)
    x_nchw = x.contiguous().permute(0, 3, 1, 2)
    name, algorithm = FUSED[activation]
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise(x_nchw, weight, shift, *geometry, name, [], algorithm)
        return y.permute(0, 2, 3, 1).contiguous()
    # oneDNN fuses a sum with relu and with nothing else, and wants the bias in the image's dtype then
    relu = "relu" if activation == "relu" else None
    residual_nchw = residual.contiguous().permute(0, 3, 1, 2)
    y = torch.ops.mkldnn._convolution_pointwise.binary(
        x_nchw, residual_nchw, weight, shift.to(x.dtype), *geometry, "add", 1.0, relu, [], None
    )
    y = y.permute(0, 2, 3, 1).contiguous()
    return F.gelu(y) if activation == "gelu" else y


def conv_norm_act_packed_inplace(
    residual: Tensor, x: Tensor, weight: Tensor, shift: Tensor, stride: int, activation: str, pad_rows: bool
) -> None:
    """Writes the result over ``residual``, which is contiguous: a fresh output of this size costs page faults."""
    relu = "relu" if activation == "relu" else None
    torch.ops.mkldnn._convolution_pointwise_.binary(
        residual.permute(0, 3, 1, 2), x.contiguous().permute(0, 3, 1, 2), weight, shift.to(x.dtype),
        *_geometry(weight, stride, pad_rows), "add", 1.0, relu, [], None,
    )  # fmt: skip
    if activation == "gelu":
        residual.copy_(F.gelu(residual))


def conv_norm_act_fwd(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, stride: int, activation: str
) -> Tensor:
    """[N, IH, IW, C] -> [N, OH, OW, OC]."""
    if x.shape[0] == 0:
        return x.new_empty(0, (x.shape[1] - 1) // stride + 1, (x.shape[2] - 1) // stride + 1, weight.shape[0])
    return conv_norm_act_packed(x, _scaled(weight, scale), shift, residual, stride, activation, True)


def _backward(
    dz: Tensor, x: Tensor, weight: Tensor, stride: int, padding: list[int], mask: list[bool]
) -> tuple[Tensor, Tensor]:
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dz.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None,
        [stride, stride], padding, [1, 1], False, [0, 0], 1, [*mask, False],
    )  # fmt: skip
    return dx, dweight


def _weight_gradient(dz: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """[OC, C, K, K], as the sum of strips': oneDNN's own sum over a large image loses digits."""
    images, height, width, _ = dz.shape
    pad = weight.shape[-1] // 2
    rows = max(1, LONGEST_SUM // width)
    if images * height <= rows:
        return _backward(dz, x, weight, stride, [pad, pad], [False, True])[1].contiguous()
    total = torch.zeros(weight.shape, dtype=torch.float64)
    for image in range(images):
        for first in range(0, height, rows):
            last = min(first + rows, height)
            start, stop = first * stride - pad, (last - 1) * stride + pad + 1
            above, below = max(0, -start), max(0, stop - x.shape[1])
            strip = x[image : image + 1, start + above : stop - below]
            if above or below:
                strip = F.pad(strip, (0, 0, 0, 0, above, below))
            total += _backward(dz[image : image + 1, first:last], strip, weight, stride, [0, pad], [False, True])[1]
    return total.to(weight.dtype)


def _convolution_bwd(
    dz: Tensor, x: Tensor, weight: Tensor, stride: int, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dz [N, OH, OW, OC], x [N, IH, IW, C] -> dx, dweight."""
    pad = weight.shape[-1] // 2
    dx, dweight = None, None
    if pad == 0 and stride == 1:  # two products: MKL is faster at them than oneDNN's backward
        rows, x_rows = dz.flatten(0, 2), x.flatten(0, 2)
        if output_mask[0]:
            dx = (rows @ weight.flatten(1)).view(x.shape)
        if output_mask[1]:
            dweight = (rows.mT @ x_rows).view(weight.shape)
        return dx, dweight
    if output_mask[0]:
        dx = _backward(dz, x, weight, stride, [pad, pad], [True, False])[0].permute(0, 2, 3, 1).contiguous()
    if output_mask[1]:
        dweight = _weight_gradient(dz, x, weight, stride)
    return dx, dweight


def conv_norm_act_bwd(
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
    """Gradients of x, weight, scale, shift, residual; those not in ``output_mask`` are empty.

    The convolution is linear in its weight, so ``sum(dz * y)`` of a channel is the product of its weight with the
    weight's gradient: the convolution's output is neither kept nor computed again for it.
    """
    like = (x, weight, scale, shift, out)
    if dout.numel() == 0:
        return tuple(t.new_zeros(t.shape) if m else x.new_empty(0) for t, m in zip(like, output_mask, strict=True))
    x = x.contiguous()
    dz = dout.contiguous()
    if activation == "relu":
        dz = torch.ops.aten.threshold_backward(dz, out, 0)
    elif activation == "gelu":
        dz = torch.ops.aten.gelu_backward(dz, conv_norm_act_fwd(x, weight, scale, shift, residual, stride, "none"))

    dx, dweight, dscale, dshift, dresidual = (x.new_empty(0) for _ in range(5))
    wanted = [output_mask[0], output_mask[1] or output_mask[2]]
    if any(wanted):
        image, plain = _convolution_bwd(dz, x, _scaled(weight, scale), stride, wanted)
        dx = dx if image is None else image
        if output_mask[2]:
            dscale = (plain * weight).sum((1, 2, 3), dtype=scale.dtype)
        if output_mask[1]:
            dweight = _scaled(plain, scale)
    if output_mask[3]:
        dshift = dz.sum((0, 1, 2), dtype=shift.dtype)
    if output_mask[4]:
        dresidual = dz.clone() if activation == "none" else dz  # never dout itself
    return dx, dweight, dscale, dshift, dresidual
