"""Reference of ``inject_rows`` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import onednn


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _injected(hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, row_idx: Tensor) -> Tensor:
    acc = _sum_dtype(hidden)
    rows = hidden[row_idx].to(acc) + onednn.linear(update, weight, bias).to(acc)  # [R, C]
    return rows.to(hidden.dtype)


def inject_rows_ref(hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, row_idx: Tensor) -> Tensor:
    """Compute [T, C], [R, D] -> [T, C]."""
    out = hidden.clone(memory_format=torch.contiguous_format)
    return out.index_copy(0, row_idx, _injected(hidden, update, weight, bias, row_idx))


def inject_rows_inplace_ref(
    hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, row_idx: Tensor
) -> None:
    """Write the rows of ``hidden``."""
    hidden.index_copy_(0, row_idx, _injected(hidden, update, weight, bias, row_idx))


def inject_rows_bwd_ref(
    dout: Tensor, update: Tensor, weight: Tensor, row_idx: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of update, weight, bias; those not in ``output_mask`` are empty. That of hidden is dout."""
    drows = dout[row_idx].to(update.dtype)  # [R, C]; under autocast dout is fp32 and update is not
    dupdate, dweight, dbias = (update.new_empty(0) for _ in range(3))
    if output_mask[0]:
        dupdate = onednn.matmul(drows, weight)
    if output_mask[1]:
        dweight = onednn.matmul(drows.mT, update)
    if output_mask[2]:
        dbias = drows.sum(0, dtype=_sum_dtype(dout)).to(update.dtype)
    return dupdate, dweight, dbias
