"""What measurements are compared with: one image, all heads at once, every pair, singular values."""

from __future__ import annotations

import math

import torch


def by_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)  # [..., H, N, d]


def attention_by_hand(q, k, v, heads):
    """One image: all heads at once, as written in a textbook. Returns [Q, D] and the weights [H, Q, N]."""
    q, k, v = (by_heads(x, heads) for x in (q, k, v))
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    return (weights @ v).transpose(0, 1).flatten(1), weights


def entropy_by_hand(weights):
    return float((-weights * weights.log()).sum(-1).mean() / math.log(weights.shape[-1]))


def cosine_by_hand(rows):
    rows = rows / rows.norm(dim=1, keepdim=True)
    pairs = [float(rows[i] @ rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    return sum(pairs) / len(pairs)


def rank_by_hand(rows):
    energies = torch.linalg.svdvals(rows) ** 2
    shares = energies / energies.sum()
    return float((-(shares * shares.clamp_min(1e-300).log()).sum()).exp())
