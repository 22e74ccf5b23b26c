"""Limits that other libraries' kernels have in common, and what their rows do behind and before them.

They are made for keys in every sequence: what a sequence without keys gets differs from library to library. They trust
``cu_seqlens``, whose values nobody has checked on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import devices
from ...core.checks import HALVES

Packing = tuple[Tensor, Tensor, int, int]  # cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k


def unsupported_reasons(
    q: Tensor, k: Tensor, softmax_scale: float, *, max_head_dim: int, dlse: Tensor | None = None, **rest: Any
) -> list[str]:
    """Return why kernels of 16-bit tensors can't serve a call; no values are read.

    Args:
        q: [Tq, H, D].
        k: [Tk, H, D].
        softmax_scale: of the scores.
        max_head_dim: of the kernels.
        dlse: gradient of lse, which they don't take.
        rest: of the call, not looked at.
    """
    found = devices.not_cuda_reasons(q)
    if found:
        return found
    if q.dtype not in HALVES:
        found.append(f"tensors must be float16 or bfloat16, got {str(q.dtype).removeprefix('torch.')}")
    if q.shape[2] > max_head_dim:
        found.append(f"head_dim must be at most {max_head_dim}, got {q.shape[2]}")
    if q.numel() == 0 or k.numel() == 0:
        found.append("there must be queries and keys, got none")
    if not 0 < softmax_scale < float("inf"):
        found.append(f"softmax_scale must be above 0 and finite, got {softmax_scale}")
    if dlse is not None:
        found.append("it takes no gradient of lse")
    return found


def unavailable_reasons() -> list[str]:
    """Return why no kernel for NVIDIA GPUs runs on this machine."""
    if not torch.cuda.is_available():
        return ["no CUDA device that torch can see"]
    return ["its kernels are for NVIDIA GPUs, and torch is built for AMD's"] if torch.version.hip else []


def capability(q: Tensor) -> tuple[int, int]:
    """Return the compute capability of the tensor's device."""
    return torch.cuda.get_device_capability(q.device)


def too_old_reasons(q: Tensor, oldest: tuple[int, int]) -> list[str]:
    """Return why the tensor's device can't run kernels for ``oldest`` and later ones."""
    found = capability(q)
    return (
        [f"the device must be sm_{oldest[0]}{oldest[1]} or newer, got sm_{found[0]}{found[1]}"]
        if found < oldest
        else []
    )


def is_even(rows: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> bool:
    """Tell whether every sequence has ``max_seqlen`` rows: the number of rows says so, where lengths are right."""
    return rows.shape[0] == (cu_seqlens.shape[0] - 1) * max_seqlen


def within_rows(q: Tensor, k: Tensor, packing: Packing) -> Packing:
    """Return the packing with lengths of no more than all rows: some kernels refuse larger ones."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = packing
    return cu_seqlens_q, cu_seqlens_k, min(max_seqlen_q, q.shape[0]), min(max_seqlen_k, k.shape[0])


def readable(x: Tensor) -> Tensor:
    """Return a tensor as the kernels read it: contiguous channels, rows and heads at multiples of 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and all(step % 8 == 0 and step > 0 for step in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def sequences_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the sequence of every row, [T] int64, without waiting for the device."""
    numbers = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(numbers, cu_seqlens.diff(), output_size=tokens)


def _without(cu_partners: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Tell of every row whether its sequence has no partners, [T]."""
    return (cu_partners.diff() == 0)[sequences_of(cu_seqlens, tokens)]


def mend_forward(out: Tensor, lse: Tensor, k: Tensor, packing: Packing) -> None:
    """Write what queries of a sequence without keys get: zeros, and an lse of -inf."""
    cu_seqlens_q, cu_seqlens_k, _, max_seqlen_k = packing
    if is_even(k, cu_seqlens_k, max_seqlen_k):
        return
    alone = _without(cu_seqlens_k, cu_seqlens_q, out.shape[0])
    out.masked_fill_(alone[:, None, None], 0)
    lse.masked_fill_(alone, float("-inf"))


def mend_backward(grads: tuple[Tensor, Tensor, Tensor], packing: Packing) -> None:
    """Write the gradients, zeros, of sequences that have no keys, or no queries."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = packing
    dq, dk, dv = grads
    if not is_even(dk, cu_seqlens_k, max_seqlen_k):
        dq.masked_fill_(_without(cu_seqlens_k, cu_seqlens_q, dq.shape[0])[:, None, None], 0)
    if not is_even(dq, cu_seqlens_q, max_seqlen_q):
        alone = _without(cu_seqlens_q, cu_seqlens_k, dk.shape[0])[:, None, None]
        dk.masked_fill_(alone, 0)
        dv.masked_fill_(alone, 0)


def packed_lse(lse: Tensor, cu_seqlens_q: Tensor, tokens: int) -> Tensor:
    """Return [H, Tq] of [B, H, at least the longest], contiguous."""
    sequence = sequences_of(cu_seqlens_q, tokens)
    place = torch.arange(tokens, device=lse.device) - cu_seqlens_q[sequence]
    return lse[sequence, :, place].mT.contiguous()


def padded_lse(lse: Tensor, cu_seqlens_q: Tensor, longest: int) -> Tensor:
    """Return [B, H, longest] of [H, Tq], zeros beyond a sequence's queries."""
    heads, tokens = lse.shape
    sequence = sequences_of(cu_seqlens_q, tokens)
    place = torch.arange(tokens, device=lse.device) - cu_seqlens_q[sequence]
    padded = torch.zeros(cu_seqlens_q.shape[0] - 1, heads, longest, dtype=lse.dtype, device=lse.device)
    padded[sequence, :, place] = lse.mT
    return padded
