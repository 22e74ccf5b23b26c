"""``condition_queries`` on the CPU, fp32: the rows ``native`` and ``cpu``, by :mod:`hia_kernels.core.products`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ...core.products import Products, Size, layer_sizes, unsupported_tensors


def unsupported_reasons(function: str, hidden: Tensor, **rest: Any) -> list[str]:
    """Return why a call can't be served; its tensors are of one dtype."""
    return unsupported_tensors(hidden)


def product_sizes(
    function: str,
    hidden: Tensor,
    row_idx: Tensor,
    weight: Tensor,
    output_mask: Sequence[bool] | None = None,
    **rest: Any,
) -> list[Size]:
    """Return the products of a call."""
    return layer_sizes(row_idx.shape[0], hidden.shape[1], weight.shape[0], output_mask)


def functions(products: Products) -> dict[str, Callable[..., Any]]:
    """Return the op's functions with these products."""
    return {
        "condition_queries": partial(condition_queries_fwd, products),
        "condition_queries_bwd": partial(condition_queries_bwd, products),
    }


def condition_queries_fwd(
    products: Products, hidden: Tensor, row_idx: Tensor, weight: Tensor, bias: Tensor | None, queries: Tensor
) -> Tensor:
    """Return [B, M, D] of hidden [T, C] and row_idx [B]."""
    shift = products.linear(hidden[row_idx], weight, bias)  # [B, D]
    return (queries + shift[:, None]).contiguous()


def condition_queries_bwd(
    products: Products, dout: Tensor, hidden: Tensor, row_idx: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight, bias, queries; those not in ``output_mask`` are empty."""
    dshift = dout.sum(1)  # [B, D]
    dhidden, dweight, dbias, dqueries = (hidden.new_empty(0) for _ in range(4))
    if output_mask[0]:
        drows = products.product(dshift, weight)  # [B, C]
        dhidden = hidden.new_zeros(hidden.shape).index_add_(0, row_idx, drows)
    if output_mask[1]:
        dweight = products.product(dshift.mT, hidden[row_idx])
    if output_mask[2]:
        dbias = dshift.sum(0)
    if output_mask[3]:
        dqueries = dout.sum(0)
    return dhidden, dweight, dbias, dqueries
