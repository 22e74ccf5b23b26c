"""``linear`` on the CPU, fp32: the products of :mod:`hia_kernels.core.products`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core import products


def unsupported_reasons(function: str, x: Tensor, **rest: Any) -> list[str]:
    """Return why a call can't be served; its tensors are of one dtype."""
    return products.unsupported_reasons(x)


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[R, C] -> [R, D]."""
    return products.linear(x, weight, bias)


def linear_bwd(dout: Tensor, x: Tensor, weight: Tensor, output_mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias; those not in ``output_mask`` are empty."""
    dx, dweight, dbias = (x.new_empty(0) for _ in range(3))
    if output_mask[0]:
        dx = products.product(dout, weight)
    if output_mask[1]:
        dweight = products.product(dout.mT, x)
    if output_mask[2]:
        dbias = dout.sum(0)
    return dx, dweight, dbias
