"""Reference of ``cross_attention`` in plain PyTorch: one sequence after the other, scores in full."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _acc_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        yield slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])


def _heads_first(x: Tensor, rows: slice) -> Tensor:
    return x[rows].transpose(0, 1).to(_acc_dtype(x))  # [H, L, D]


def cross_attention_with_lse_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute [Tq, H, D], [Tk, H, D] -> out [Tq, H, D], lse [H, Tq]."""
    outs = [q.new_empty(0, *q.shape[1:])]
    lses = [torch.empty(q.shape[1], 0, dtype=_acc_dtype(q), device=q.device)]
    for rows_q, rows_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        q_b, k_b, v_b = _heads_first(q, rows_q), _heads_first(k, rows_k), _heads_first(v, rows_k)
        if k_b.shape[1] == 0:
            outs.append(q.new_zeros(q_b.shape[1], *q.shape[1:]))
            lses.append(torch.full_like(q_b[..., 0], float("-inf")))
            continue
        scores = q_b @ k_b.mT * softmax_scale  # [H, Lq, Lk]
        lse = torch.logsumexp(scores, dim=-1)  # [H, Lq]
        out = torch.softmax(scores, dim=-1) @ v_b  # [H, Lq, D]
        outs.append(out.transpose(0, 1).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


def cross_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
) -> Tensor:
    """Compute [Tq, H, D], [Tk, H, D] -> [Tq, H, D]."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return cross_attention_with_lse_ref(q, k, v, *lengths, softmax_scale)[0]


def cross_attention_bwd_ref(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v. ``dlse``: [H, Tq], the gradient that arrives at lse (None if none does).

    p is the softmax again: beside large scores ``lse`` has lost the sum. Only a query with an infinite score, which has
    no softmax, keeps exp(scores - lse), so that its NaN is where that of kernels which know nothing else is.
    """
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for rows_q, rows_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        q_b, k_b, v_b = _heads_first(q, rows_q), _heads_first(k, rows_k), _heads_first(v, rows_k)
        if q_b.shape[1] == 0 or k_b.shape[1] == 0:
            continue
        do_b, o_b = _heads_first(dout, rows_q), _heads_first(out, rows_q)
        scores, lse_b = q_b @ k_b.mT * softmax_scale, lse[:, rows_q, None]
        p = torch.where(lse_b == torch.inf, torch.exp(scores - lse_b), torch.softmax(scores, dim=-1))  # [H, Lq, Lk]
        delta = (do_b * o_b).sum(-1)  # [H, Lq]
        if dlse is not None:
            delta = delta - dlse[:, rows_q]
        ds = p * (do_b @ v_b.mT - delta[..., None]) * softmax_scale
        dq[rows_q] = (ds @ k_b).transpose(0, 1).to(q.dtype)
        dk[rows_k] = (ds.mT @ q_b).transpose(0, 1).to(k.dtype)
        dv[rows_k] = (p.mT @ do_b).transpose(0, 1).to(v.dtype)
    return dq, dk, dv
