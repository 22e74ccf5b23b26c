"""Plain PyTorch truth of ``row_softmax``."""

from __future__ import annotations

import torch
from torch import Tensor


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _shift(scaled: Tensor) -> Tensor:
    """[R, N] -> [R, 1]: what to subtract before exp; 0 for a row of -inf, whose log-sum-exp is -inf."""
    if scaled.shape[1] == 0:
        return scaled.new_zeros(scaled.shape[0], 1)
    top = scaled.detach().amax(1, keepdim=True)  # the result does not depend on it, so no gradient passes
    return top.masked_fill(top == float("-inf"), 0)


def row_softmax_ref(scores: Tensor, scale: float, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """[R, N] -> p [R, N], lse [R]."""
    scaled = scores.to(_sum_dtype(scores)) * scale
    shift = _shift(scaled)
    weights = torch.exp(scaled - shift)
    total = weights.sum(1, keepdim=True)  # [R, 1]
    p = (weights / total).to(out_dtype or scores.dtype).contiguous()
    return p, (shift + total.log()).squeeze(1)


def row_softmax_inplace_ref(scores: Tensor, scale: float) -> Tensor:
    """Writes p into ``scores``; lse [R]. The same steps, in the memory that is there."""
    p = scores.to(_sum_dtype(scores))  # scores themselves, unless they are halves
    p.mul_(scale)
    shift = _shift(p)
    p.sub_(shift).exp_()
    total = p.sum(1, keepdim=True)
    p.div_(total)
    if p is not scores:
        scores.copy_(p)
    return (shift + total.log()).squeeze(1)


def row_softmax_bwd_ref(dp: Tensor, p: Tensor, scale: float, dlse: Tensor | None = None) -> Tensor:
    """Gradient of the scores [R, N], dtype of ``p``."""
    acc = _sum_dtype(p)
    dp_acc, p_acc = dp.to(acc), p.to(acc)
    delta = (p_acc * dp_acc).sum(1, keepdim=True)  # [R, 1]
    if dlse is not None:
        delta = delta - dlse.to(acc)[:, None]
    return (scale * p_acc * (dp_acc - delta)).to(p.dtype).contiguous()
