"""``norm_linear`` on the CPU, fp32, with PyTorch's norm: the rows ``native`` and ``cpu``, by their
:mod:`hia_kernels.core.products`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.products import Products, Size, layer_sizes, unsupported_tensors


def unsupported_reasons(function: str, x: Tensor, norm_weight: Tensor, **rest: Any) -> list[str]:
    """Return why a call can't be served; its other tensors are of these dtypes."""
    return unsupported_tensors(x, norm_weight)


def product_sizes(
    function: str,
    x: Tensor,
    weight: Tensor,
    row_idx: Tensor | None,
    output_mask: Sequence[bool] | None = None,
    **rest: Any,
) -> list[Size]:
    """Return the products of a call."""
    rows = x.shape[0] if row_idx is None else row_idx.shape[0]
    mask = None if output_mask is None else (any(output_mask[:3]), output_mask[3])
    return layer_sizes(rows, x.shape[1], weight.shape[0], mask)


def functions(products: Products) -> dict[str, Callable[..., Any]]:
    """Return the op's functions with these products."""
    return {"norm_linear": partial(norm_linear_fwd, products), "norm_linear_bwd": partial(norm_linear_bwd, products)}


def norm_linear_fwd(
    products: Products,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_idx: Tensor | None,
    eps: float,
) -> Tensor:
    """Return [R, D] of x [T, C]."""
    y = F.layer_norm(x if row_idx is None else x[row_idx], x.shape[1:], norm_weight, norm_bias, eps)
    return products.linear(y, weight, bias)


def norm_linear_bwd(
    products: Products,
    dout: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    row_idx: Tensor | None,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, norm_weight, norm_bias, weight, bias; those not in ``output_mask`` are empty.

    PyTorch's backward of the norm subtracts large numbers where a row's mean is far from 0. It is therefore given the
    normed rows, whose mean is 0 and whose deviation is 1, and 1 / deviation is multiplied in behind it.
    """
    dx, dnorm_weight, dnorm_bias, dweight, dbias = (x.new_empty(0) for _ in range(5))
    wants_norm, wants_weight = any(output_mask[:3]), output_mask[3]
    if wants_norm or wants_weight:
        rows = x if row_idx is None else x[row_idx]  # [R, C]
        normed, mean, rstd = torch.native_layer_norm(rows, rows.shape[1:], None, None, eps)
        del rows
    if wants_weight:
        dweight = products.product(dout.mT, torch.addcmul(norm_bias, normed, norm_weight))
    if wants_norm:
        dy = products.product(dout, weight)  # [R, C]
        drows, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
            dy,
            normed,
            normed.shape[1:],
            mean.zero_(),
            torch.ones_like(rstd),
            norm_weight,
            norm_bias,
            [output_mask[0], True, True],
        )
        del dy, normed
        if output_mask[0]:
            drows.mul_(rstd)
            dx = drows if row_idx is None else x.new_zeros(x.shape).index_add_(0, row_idx, drows)
    if output_mask[4]:
        dbias = dout.sum(0)
    return dx, dnorm_weight, dnorm_bias, dweight, dbias
