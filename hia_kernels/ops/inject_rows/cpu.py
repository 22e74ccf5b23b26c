"""``inject_rows`` on the CPU, fp32, added where the rows lie: the rows ``native`` and ``cpu``, by their
:mod:`hia_kernels.core.products`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.products import Products, Size, layer_sizes, unsupported_tensors


def unsupported_reasons(
    function: str, update: Tensor, hidden: Tensor | None = None, dout: Tensor | None = None, **rest: Any
) -> list[str]:
    """Return why a call can't be served; hidden states and their gradient may be wider than ``update``."""
    stream = dout if hidden is None else hidden
    return unsupported_tensors(update if stream is None else stream, update)


def product_sizes(
    function: str, update: Tensor, weight: Tensor, output_mask: Sequence[bool] | None = None, **rest: Any
) -> list[Size]:
    """Return the products of a call."""
    return layer_sizes(update.shape[0], update.shape[1], weight.shape[0], output_mask)


def functions(products: Products) -> dict[str, Callable[..., Any]]:
    """Return the op's functions with these products."""
    return {
        "inject_rows": partial(inject_rows_fwd, products),
        "inject_rows_": partial(inject_rows_inplace, products),
        "inject_rows_bwd": partial(inject_rows_bwd, products),
    }


def inject_rows_fwd(
    products: Products, hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, row_idx: Tensor
) -> Tensor:
    """Return [T, C] of hidden [T, C] and update [R, D]."""
    out = hidden.clone(memory_format=torch.contiguous_format)
    inject_rows_inplace(products, out, update, weight, bias, row_idx)
    return out


def inject_rows_inplace(
    products: Products, hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, row_idx: Tensor
) -> None:
    """Write the rows of ``hidden``: nothing is gathered, and the sum needs no memory of its own."""
    hidden.index_add_(0, row_idx, products.linear(update, weight, bias))


def inject_rows_bwd(
    products: Products, dout: Tensor, update: Tensor, weight: Tensor, row_idx: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of update, weight, bias; those not in ``output_mask`` are empty. Hidden's is ``dout``."""
    drows = dout[row_idx]  # [R, C]
    dupdate, dweight, dbias = (update.new_empty(0) for _ in range(3))
    if output_mask[0]:
        dupdate = products.product(drows, weight)
    if output_mask[1]:
        dweight = products.product(drows.mT, update)
    if output_mask[2]:
        dbias = drows.sum(0)
    return dupdate, dweight, dbias
