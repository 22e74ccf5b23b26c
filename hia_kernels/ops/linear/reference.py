"""Reference of ``linear`` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import onednn


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute [R, C] -> [R, D]."""
    return onednn.linear(x, weight, bias)


def linear_bwd_ref(dout: Tensor, x: Tensor, weight: Tensor, output_mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias; those not in ``output_mask`` are empty."""
    dx, dweight, dbias = (x.new_empty(0) for _ in range(3))
    if output_mask[0]:
        dx = onednn.matmul(dout, weight)
    if output_mask[1]:
        dweight = onednn.matmul(dout.mT, x)
    if output_mask[2]:
        dbias = dout.sum(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32).to(x.dtype)
    return dx, dweight, dbias
