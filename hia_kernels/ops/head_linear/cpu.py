"""``head_linear`` on the CPU, fp32: head by head, by the products of :mod:`hia_kernels.core.products`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import products
from .reference import by_head


def unsupported_reasons(function: str, x: Tensor, **rest: Any) -> list[str]:
    """Return why a call can't be served; its tensors are of one dtype."""
    return products.unsupported_reasons(x)


def head_linear_fwd(x: Tensor, weight: Tensor, merge_heads: bool) -> Tensor:
    """[n, H, R, C] -> [n, H, R, D] or [n, R, H * D]."""
    images, heads, rows, _ = x.shape
    out = x.new_empty((images, rows, heads, weight.shape[1]) if merge_heads else (*x.shape[:3], weight.shape[1]))
    parts = out.transpose(1, 2) if merge_heads else out  # [n, H, R, D]
    for head, own in enumerate(weight):
        for image in range(images):
            products.multiply(x[image, head], own.mT, parts[image, head])
    return out.flatten(2) if merge_heads else out


def head_linear_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, merge_heads: bool, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x, contiguous, and of weight, laid out as it; those not in ``output_mask`` are empty."""
    images = x.shape[0]
    dout = by_head(dout, weight, merge_heads)
    dx, dweight = (x.new_empty(0) for _ in range(2))
    if output_mask[0]:
        dx = x.new_empty(x.shape)
        for head, own in enumerate(weight):
            for image in range(images):
                products.multiply(dout[image, head], own, dx[image, head])
    if output_mask[1]:
        dweight = torch.empty_like(weight) if images else torch.zeros_like(weight)
        for head, to in enumerate(dweight):
            for image in range(images):
                products.multiply(dout[image, head].mT, x[image, head], to, add=image > 0)
    return dx, dweight
