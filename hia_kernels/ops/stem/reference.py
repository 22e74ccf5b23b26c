"""Reference of ``stem`` in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import onednn


def _windowed(pixels: Tensor, window: Tensor, acc: torch.dtype) -> Tensor:
    """Return pixels [N, IH, IW, CP] in units of the window: 0 is its low end, 1 its high end."""
    low, high = window.to(acc)[:, :, None, None, None].unbind(1)  # [N, 1, 1, 1]
    return (pixels.to(acc) - low) / (high - low)


def _normalised(pixels: Tensor, window: Tensor, mean: Tensor, std: Tensor, weight: Tensor) -> Tensor:
    """Return the normalised image, [N, 3, IH, IW] channels last, dtype of ``weight``."""
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    p = _windowed(pixels, window, acc).clamp(0, 1)
    x = (p - mean.to(acc)) / std.to(acc)  # a grey channel broadcasts to three
    return x.to(weight.dtype).permute(0, 3, 1, 2)


def _conv(x: Tensor, weight: Tensor) -> Tensor:
    return onednn.convolution(x.permute(0, 2, 3, 1), weight, 2).permute(0, 3, 1, 2)


def _scaled(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return y.to(scale.dtype) * scale[:, None, None] + shift[:, None, None]


def stem_ref(
    pixels: Tensor,
    window: Tensor,
    mean: Tensor,
    std: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    pool: int,
) -> Tensor:
    """Compute [N, IH, IW, CP] -> [N, PH, PW, OC]."""
    y = _conv(_normalised(pixels, window, mean, std, weight), weight)
    z = F.relu(_scaled(y, scale, shift))
    if pool == 3:
        z = F.max_pool2d(z, kernel_size=3, stride=2, padding=1)
    return z.permute(0, 2, 3, 1).to(weight.dtype, copy=True, memory_format=torch.contiguous_format)  # no view


def stem_bwd_ref(
    dout: Tensor,
    pixels: Tensor,
    window: Tensor,
    mean: Tensor,
    std: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    pool: int,
    output_mask: list[bool],
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of pixels, weight, scale, shift; those not in ``output_mask`` are empty.

    Nothing of full resolution is saved by the forward pass; it is computed again here, and ``out`` is not read.
    """
    x = _normalised(pixels, window, mean, std, weight)
    y = _conv(x, weight)
    r = F.relu(_scaled(y, scale, shift))
    dr = dout.permute(0, 3, 1, 2).to(r.dtype)
    if pool == 3:
        _, index = torch.ops.aten.max_pool2d_with_indices(r, [3, 3], [2, 2], [1, 1])
        dr = torch.ops.aten.max_pool2d_with_indices_backward(dr, r, [3, 3], [2, 2], [1, 1], [1, 1], False, index)
    dz = torch.where(r > 0, dr, 0)  # [N, OC, OH, OW]

    dpixels, dweight, dscale, dshift = (weight.new_empty(0) for _ in range(4))
    if output_mask[0] or output_mask[1]:
        dy = (dz * scale[:, None, None]).to(weight.dtype)
        dy, x = dy.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
        dx, dw = onednn.convolution_backward(dy, x, weight, 2, output_mask[:2])
        if dx is not None:
            dpixels = _pixel_gradient(dx.permute(0, 3, 1, 2), pixels, window, std)
        if dw is not None:
            dweight = dw
    if output_mask[2]:
        dscale = (dz * y.to(dz.dtype)).sum((0, 2, 3))
    if output_mask[3]:
        dshift = dz.sum((0, 2, 3))
    return dpixels, dweight, dscale, dshift


def _pixel_gradient(dx: Tensor, pixels: Tensor, window: Tensor, std: Tensor) -> Tensor:
    """Compute [N, 3, IH, IW] -> [N, IH, IW, CP], through normalisation and window; outside it passes no gradient."""
    acc = torch.float64 if dx.dtype == torch.float64 else torch.float32
    dp = dx.permute(0, 2, 3, 1).to(acc) / std.to(acc)
    if pixels.shape[-1] == 1:
        dp = dp.sum(-1, keepdim=True)
    p = _windowed(pixels, window, acc)
    low, high = window.to(acc)[:, :, None, None, None].unbind(1)
    inside = (p >= 0) & (p <= 1)
    return torch.where(inside, dp / (high - low), 0).to(pixels.dtype).contiguous()
