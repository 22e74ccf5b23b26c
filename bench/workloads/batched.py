"""Packed sequences as batches, and the reference attention in a form that a compiler takes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def sequences(q: Tensor, k: Tensor, v: Tensor, packing: tuple[Any, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return packed tensors as [B, H, L, D]: one triple where all sequences have one length, else one a sequence.

    Args:
        q: [Tq, H, D].
        k: [Tk, H, D].
        v: [Tk, H, D].
        packing: cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k.
    """
    cu_q, cu_k, max_q, max_k = packing
    batch = cu_q.shape[0] - 1
    if q.shape[0] == batch * max_q and k.shape[0] == batch * max_k:  # by shapes: nothing waits for the device
        return [tuple(x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))]
    found = []
    for (from_q, to_q), (from_k, to_k) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        rows = (q[from_q:to_q], k[from_k:to_k], v[from_k:to_k])
        found.append(tuple(x[None].transpose(1, 2) for x in rows))
    return found


def packed(outs: list[Tensor]) -> Tensor:
    """Pack results again: [B, H, L, D] each -> [Tq, H, D]."""
    parts = [out.transpose(1, 2).flatten(0, 1) for out in outs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def batched_attention(q: Tensor, k: Tensor, v: Tensor, *packing_and_scale: Any) -> Tensor:
    """Attend in batches of sequences of one length, scores in fp32.

    This is the reference, whose loop over lengths that it reads off a tensor no compiler can take, in a form that one
    can.
    """
    *packing, scale = packing_and_scale
    outs = []
    for q_b, k_b, v_b in sequences(q, k, v, tuple(packing)):
        p = torch.softmax(q_b.float() @ k_b.float().mT * scale, dim=-1)  # [B, H, Lq, Lk]
        outs.append((p @ v_b.float()).to(q.dtype))
    return packed(outs)
