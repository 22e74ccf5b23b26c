"""Reference of ``latent_attention`` in plain PyTorch: one image after the other, scores in full."""

from __future__ import annotations

import torch
from torch import Tensor


def _acc_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def latent_attention_ref(q: Tensor, latent: Tensor, lengths: list[int], softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Compute [n, G, E], [T, E] -> out [n, G, E], lse [n, G]."""
    acc = _acc_dtype(q)
    outs, lses = [q.new_empty(0, *q.shape[1:])], [torch.empty(0, q.shape[1], dtype=acc, device=q.device)]
    for queries, tokens in zip(q.to(acc), latent.to(acc).split(lengths), strict=True):
        scores = queries @ tokens.mT * softmax_scale  # [G, N]
        lse = torch.logsumexp(scores, dim=-1) if tokens.shape[0] else scores.new_full(scores.shape[:1], float("-inf"))
        out = torch.softmax(scores, dim=-1) @ tokens  # [G, E]; zeros where there is no token
        outs.append(out.to(q.dtype)[None])
        lses.append(lse[None])
    return torch.cat(outs), torch.cat(lses)


def latent_attention_bwd_ref(
    dout: Tensor, q: Tensor, latent: Tensor, out: Tensor, lse: Tensor, lengths: list[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and latent. ``lse`` is not read: beside large scores it has lost the sum."""
    acc = _acc_dtype(q)
    dqs, dlatents = [q.new_empty(0, *q.shape[1:])], [latent.new_empty(0, latent.shape[1])]
    images = zip(dout.to(acc), q.to(acc), latent.to(acc).split(lengths), out.to(acc), strict=True)
    for dout_i, queries, tokens, out_i in images:
        p = torch.softmax(queries @ tokens.mT * softmax_scale, dim=-1)  # [G, N]
        delta = (dout_i * out_i).sum(-1, keepdim=True)  # [G, 1]
        ds = p * (dout_i @ tokens.mT - delta) * softmax_scale  # [G, N]
        dqs.append((ds @ tokens).to(q.dtype)[None])
        dlatents.append((p.mT @ dout_i + ds.mT @ queries).to(latent.dtype))
    return torch.cat(dqs), torch.cat(dlatents)
