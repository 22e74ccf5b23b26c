"""``head_linear`` by batched products of the vendor's library, the heads their batch.

Image by image where the weight is an operand: a batch of images and heads would copy it for each image. Its gradient
is one product over the rows of all images, summed in the library's accumulator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import by_head


def head_linear_batched(x: Tensor, weight: Tensor, merge_heads: bool) -> Tensor:
    """Return [n, H, R, D] or [n, R, H * D] of x [n, H, R, C]."""
    images, heads, rows, _ = x.shape
    dim = weight.shape[1]
    if merge_heads:
        out = x.new_empty(images, rows, heads * dim)
        for image, to in zip(x, out.view(images, rows, heads, dim), strict=True):
            to.copy_(torch.bmm(image, weight.mT).transpose(0, 1))
        return out
    return _by_image(x, weight.mT)


def head_linear_bwd_batched(
    dout: Tensor, x: Tensor, weight: Tensor, merge_heads: bool, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, contiguous, and of weight, laid out as it; those not in ``output_mask`` are empty."""
    dout = by_head(dout, weight, merge_heads)
    dx, dweight = (x.new_empty(0) for _ in range(2))
    if output_mask[0]:
        dx = _by_image(dout, weight)
    if output_mask[1]:
        douts, rows = (tensor.transpose(0, 1).flatten(1, 2) for tensor in (dout, x))  # [H, n * R, .]
        dweight = torch.empty_like(weight)
        if dweight.stride(-1) == 1:
            torch.bmm(douts.mT, rows, out=dweight)
        else:
            dweight.copy_(torch.bmm(rows.mT, douts).mT)
    return dx, dweight


def _by_image(x: Tensor, right: Tensor) -> Tensor:
    """Return [n, H, R, N] of x [n, H, R, K] and right [H, K, N]."""
    out = x.new_empty(*x.shape[:3], right.shape[2])
    for image, to in zip(x, out, strict=True):
        torch.bmm(image, right, out=to)
    return out
