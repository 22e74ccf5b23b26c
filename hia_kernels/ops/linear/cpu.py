"""``linear`` on the CPU, fp32: the rows ``native`` and ``cpu``, by their :mod:`hia_kernels.core.products`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ...core.products import Products, Size, layer_sizes, unsupported_tensors


def unsupported_reasons(function: str, x: Tensor, **rest: Any) -> list[str]:
    """Return why a call can't be served; its tensors are of one dtype."""
    return unsupported_tensors(x)


def product_sizes(
    function: str, x: Tensor, weight: Tensor, output_mask: Sequence[bool] | None = None, **rest: Any
) -> list[Size]:
    """Return the products of a call."""
    return layer_sizes(x.shape[0], x.shape[1], weight.shape[0], output_mask)


def functions(products: Products) -> dict[str, Callable[..., Any]]:
    """Return the op's functions with these products."""
    return {"linear": partial(linear_fwd, products), "linear_bwd": partial(linear_bwd, products)}


def linear_fwd(products: Products, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return [R, D] of x [R, C]."""
    return products.linear(x, weight, bias)


def linear_bwd(
    products: Products, dout: Tensor, x: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias; those not in ``output_mask`` are empty."""
    dx, dweight, dbias = (x.new_empty(0) for _ in range(3))
    if output_mask[0]:
        dx = products.product(dout, weight)
    if output_mask[1]:
        dweight = products.product(dout.mT, x)
    if output_mask[2]:
        dbias = dout.sum(0)
    return dx, dweight, dbias
