"""Reference of ``condition_queries`` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import onednn


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def condition_queries_ref(
    hidden: Tensor, row_idx: Tensor, weight: Tensor, bias: Tensor | None, queries: Tensor
) -> Tensor:
    """Compute [T, C], [B] -> [B, M, D]."""
    shift = onednn.linear(hidden[row_idx], weight, bias)  # [B, D]
    return (queries + shift[:, None]).contiguous()


def condition_queries_bwd_ref(
    dout: Tensor, hidden: Tensor, row_idx: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight, bias, queries; those not in ``output_mask`` are empty."""
    acc = _sum_dtype(dout)
    dshift = dout.sum(1, dtype=acc).to(dout.dtype)  # [B, D]
    dhidden, dweight, dbias, dqueries = (hidden.new_empty(0) for _ in range(4))
    if output_mask[0]:
        drows = onednn.matmul(dshift, weight).to(acc)  # [B, C]
        dhidden = torch.zeros(hidden.shape, dtype=acc, device=hidden.device).index_add_(0, row_idx, drows)
        dhidden = dhidden.to(hidden.dtype)
    if output_mask[1]:
        dweight = onednn.matmul(dshift.mT, hidden[row_idx])
    if output_mask[2]:
        dbias = dshift.sum(0, dtype=acc).to(hidden.dtype)
    if output_mask[3]:
        dqueries = dout.sum(0, dtype=acc).to(hidden.dtype)
    return dhidden, dweight, dbias, dqueries
