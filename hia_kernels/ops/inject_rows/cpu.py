"""``inject_rows`` on the CPU, fp32: the products of :mod:`hia_kernels.core.products`, added where the rows lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import products


def unsupported_reasons(
    function: str, update: Tensor, hidden: Tensor | None = None, dout: Tensor | None = None, **rest: Any
) -> list[str]:
    """Return why a call can't be served; hidden states and their gradient may be wider than ``update``."""
    stream = dout if hidden is None else hidden
    return products.unsupported_reasons(update if stream is None else stream, update)


def inject_rows_fwd(hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, row_idx: Tensor) -> Tensor:
    """[T, C], [R, D] -> [T, C]."""
    out = hidden.clone(memory_format=torch.contiguous_format)
    inject_rows_inplace(out, update, weight, bias, row_idx)
    return out


def inject_rows_inplace(hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, row_idx: Tensor) -> None:
    """Writes the rows of ``hidden``: nothing is gathered, and the sum needs no memory of its own."""
    hidden.index_add_(0, row_idx, products.linear(update, weight, bias))


def inject_rows_bwd(
    dout: Tensor, update: Tensor, weight: Tensor, row_idx: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of update, weight, bias; those not in ``output_mask`` are empty. That of hidden is ``dout``."""
    drows = dout[row_idx]  # [R, C]
    dupdate, dweight, dbias = (update.new_empty(0) for _ in range(3))
    if output_mask[0]:
        dupdate = products.product(drows, weight)
    if output_mask[1]:
        dweight = products.product(drows.mT, update)
    if output_mask[2]:
        dbias = drows.sum(0)
    return dupdate, dweight, dbias
