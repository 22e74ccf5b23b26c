"""Reference of ``norm_linear`` in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import onednn


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def norm_linear_ref(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_idx: Tensor | None,
    eps: float,
) -> Tensor:
    """Compute [T, C] -> [R, D]."""
    acc = _statistics_dtype(x)
    rows = x if row_idx is None else x[row_idx]  # [R, C]
    y = F.layer_norm(rows.to(acc), rows.shape[-1:], norm_weight.to(acc), norm_bias.to(acc), eps)
    return onednn.linear(y.to(x.dtype), weight, bias)


def norm_linear_bwd_ref(
    dout: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    row_idx: Tensor | None,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, norm_weight, norm_bias, weight, bias; those not in ``output_mask`` are empty."""
    acc = _statistics_dtype(x)
    rows = (x if row_idx is None else x[row_idx]).to(acc)  # [R, C]
    centred = rows - rows.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()  # [R, 1]
    normed = centred * rstd

    dx, dnorm_weight, dnorm_bias, dweight, dbias = (x.new_empty(0) for _ in range(5))
    if any(output_mask[:3]):
        dy = onednn.matmul(dout, weight).to(acc)  # [R, C]
        dnorm_weight = (dy * normed).sum(0).to(norm_weight.dtype)
        dnorm_bias = dy.sum(0).to(norm_bias.dtype)
        if output_mask[0]:
            dnormed = dy * norm_weight.to(acc)
            mean = dnormed.mean(-1, keepdim=True)
            drows = rstd * (dnormed - mean - normed * (dnormed * normed).mean(-1, keepdim=True))
            if row_idx is None:
                dx = drows.to(x.dtype)
            else:
                dx = torch.zeros(x.shape, dtype=acc, device=x.device).index_add_(0, row_idx, drows).to(x.dtype)
    if output_mask[3]:
        y = (normed * norm_weight.to(acc) + norm_bias.to(acc)).to(x.dtype)  # [R, C]
        dweight = onednn.matmul(dout.mT, y)
    if output_mask[4]:
        dbias = dout.to(acc).sum(0).to(x.dtype)
    return dx, dnorm_weight, dnorm_bias, dweight, dbias
