"""Reference of ``row_softmax`` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _lse(shift: Tensor, l_i: Tensor) -> Tensor:
    """Return [R]; an infinite score has made ``l_i`` NaN, and its log-sum-exp is infinite."""
    shift, l_i = shift.squeeze(1), l_i.squeeze(1)
    return torch.where(shift == float("inf"), shift, shift + l_i.log())


def _shift(scaled: Tensor) -> Tensor:
    """Return [R, 1], what is subtracted before exp: the maximum, or 0 for a row of -inf, whose log-sum-exp is -inf."""
    if scaled.shape[1] == 0:
        return scaled.new_zeros(scaled.shape[0], 1)
    m_i = scaled.detach().amax(1, keepdim=True)  # the result does not depend on it, so no gradient passes
    return m_i.masked_fill(m_i == float("-inf"), 0)


def row_softmax_ref(scores: Tensor, scale: float, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Compute [R, N] -> p [R, N], lse [R]."""
    scaled = scores.to(_sum_dtype(scores)) * scale
    shift = _shift(scaled)
    weights = torch.exp(scaled - shift)
    l_i = weights.sum(1, keepdim=True)  # [R, 1]
    p = (weights / l_i).to(out_dtype or scores.dtype).contiguous()
    return p, _lse(shift, l_i)


def row_softmax_inplace_ref(scores: Tensor, scale: float) -> Tensor:
    """Write p into ``scores`` and return lse [R]: the same steps as :func:`row_softmax_ref`, in place."""
    p = scores.to(_sum_dtype(scores))  # scores themselves, unless they are halves
    p.mul_(scale)
    shift = _shift(p)
    p.sub_(shift).exp_()
    l_i = p.sum(1, keepdim=True)
    p.div_(l_i)
    if p is not scores:
        scores.copy_(p)
    return _lse(shift, l_i)


def row_softmax_bwd_ref(dp: Tensor, p: Tensor, scale: float, dlse: Tensor | None = None) -> Tensor:
    """Return the gradient of the scores [R, N], dtype of ``p``."""
    acc = _sum_dtype(p)
    dp_acc, p_acc = dp.to(acc), p.to(acc)
    delta = (p_acc * dp_acc).sum(1, keepdim=True)  # [R, 1]
    if dlse is not None:
        delta = delta - dlse.to(acc)[:, None]
    return (scale * p_acc * (dp_acc - delta)).to(p.dtype).contiguous()
