"""``head_linear`` on the CPU, fp32, head by head: the rows ``native`` and ``cpu``, by their
:mod:`hia_kernels.core.products`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.products import Products, Size, layer_sizes, unsupported_tensors
from .reference import by_head


def unsupported_reasons(function: str, x: Tensor, **rest: Any) -> list[str]:
    """Return why a call can't be served; its tensors are of one dtype."""
    return unsupported_tensors(x)


def product_sizes(
    function: str, x: Tensor, weight: Tensor, output_mask: Sequence[bool] | None = None, **rest: Any
) -> list[Size]:
    """Return the products of a call, one of each kind."""
    images, _, rows, channels = x.shape
    if images == 0:
        return []
    sizes = layer_sizes(rows, channels, weight.shape[1], output_mask)
    if output_mask is not None and output_mask[1] and weight.stride(-1) != 1:
        # the gradient lies as the weight does, and is computed transposed
        sizes.append((channels, rows, weight.shape[1]))
    return sizes


def functions(products: Products) -> dict[str, Callable[..., Any]]:
    """Return the op's functions with these products."""
    return {"head_linear": partial(head_linear_fwd, products), "head_linear_bwd": partial(head_linear_bwd, products)}


def head_linear_fwd(products: Products, x: Tensor, weight: Tensor, merge_heads: bool) -> Tensor:
    """Return [n, H, R, D] or [n, R, H * D] of x [n, H, R, C]."""
    images, heads, rows, _ = x.shape
    dim = weight.shape[1]
    out = x.new_empty((images, rows, heads * dim) if merge_heads else (images, heads, rows, dim))
    parts = out.view(images, rows, heads, dim).transpose(1, 2) if merge_heads else out  # [n, H, R, D]
    for head, own in enumerate(weight):
        for image in range(images):
            products.multiply(x[image, head], own.mT, parts[image, head])
    return out


def head_linear_bwd(
    products: Products, dout: Tensor, x: Tensor, weight: Tensor, merge_heads: bool, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, contiguous, and of weight, laid out as it; those not in ``output_mask`` are empty."""
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
