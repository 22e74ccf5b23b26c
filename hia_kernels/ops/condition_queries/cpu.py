"""``condition_queries`` on the CPU, fp32: the products of :mod:`hia_kernels.core.products`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core import products


def unsupported_reasons(function: str, hidden: Tensor, **rest: Any) -> list[str]:
    """Return why a call can't be served; its tensors are of one dtype."""
    return products.unsupported_reasons(hidden)


def condition_queries_fwd(
    hidden: Tensor, row_idx: Tensor, weight: Tensor, bias: Tensor | None, queries: Tensor
) -> Tensor:
    """[T, C], [B] -> [B, M, D]."""
    shift = products.linear(hidden[row_idx], weight, bias)  # [B, D]
    return (queries + shift[:, None]).contiguous()


def condition_queries_bwd(
    dout: Tensor, hidden: Tensor, row_idx: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias, queries; those not in ``output_mask`` are empty."""
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
