"""Reference of ``head_linear`` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import onednn


def head_linear_ref(x: Tensor, weight: Tensor, merge_heads: bool = False) -> Tensor:
    """Compute [n, H, R, C] -> [n, H, R, D] or [n, R, H * D]."""
    out = onednn.matmul(x, weight.mT)
    if not merge_heads:
        return out.contiguous()
    return torch.cat([out.new_empty(*x.shape[::2], 0), *out.unbind(1)], dim=2)  # no view, if it is of one head


def by_head(dout: Tensor, weight: Tensor, merge_heads: bool) -> Tensor:
    """Return the incoming gradient as [n, H, R, D]."""
    return dout.unflatten(2, weight.shape[:2]).transpose(1, 2) if merge_heads else dout


def head_linear_bwd_ref(
    dout: Tensor, x: Tensor, weight: Tensor, merge_heads: bool, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, contiguous, and of weight, laid out as it; those not in ``output_mask`` are empty."""
    dout = by_head(dout, weight, merge_heads)
    dx, dweight = (x.new_empty(0) for _ in range(2))
    if output_mask[0]:
        dx = onednn.matmul(dout, weight).contiguous()
    if output_mask[1]:
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        dweight = torch.empty_like(weight).copy_(torch.matmul(dout.mT.to(acc), x.to(acc)).sum(0))
    return dx, dweight
