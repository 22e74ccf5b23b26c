"""``cross_attention`` by PyTorch's memory-efficient kernel on CUDA: forward alone, for sequences of equal lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import cublas, devices
from ...core.fresh import reshaped

unavailable_reasons = cublas.unavailable_reasons  # a device that torch can see


def unsupported_reasons(
    function: str, q: Tensor, k: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, max_seqlen_k: int, **rest: Any
) -> list[str]:
    """Return why PyTorch's kernel can't serve a call; values of cu_seqlens are not read."""
    found = devices.not_cuda_reasons(q)
    if found:
        return found
    if q.element_size() != 2:
        found.append(f"tensors must be float16 or bfloat16, got {str(q.dtype).removeprefix('torch.')}")
    sequences = cu_seqlens_q.numel() - 1
    lengths = (sequences * max_seqlen_q, sequences * max_seqlen_k)
    if q.numel() == 0 or k.numel() == 0 or (q.shape[0], k.shape[0]) != lengths:
        found.append("all sequences must have max_seqlen_q queries and max_seqlen_k keys, at least one each")
    return found


def _forward(
    q: Tensor, k: Tensor, v: Tensor, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, *, with_lse: bool
) -> tuple[Tensor, Tensor]:
    lengths = (max_seqlen_q, max_seqlen_k, max_seqlen_k)
    triple = [x.unflatten(0, (-1, length)).transpose(1, 2) for x, length in zip((q, k, v), lengths, strict=True)]
    triple = [x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous() for x in triple]
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    out, lse, *_ = kernel(*triple, None, with_lse, scale=softmax_scale)
    out = reshaped(out.transpose(1, 2).contiguous(), *q.shape)
    if not with_lse:
        return out, lse
    lse = lse[..., :max_seqlen_q].transpose(0, 1).clone(memory_format=torch.contiguous_format)  # it pads the queries
    return out, reshaped(lse, *q.shape[1::-1])


def cross_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
) -> Tensor:
    """Return out [Tq, H, D], dtype of ``q``."""
    return _forward(q, k, v, max_seqlen_q, max_seqlen_k, softmax_scale, with_lse=False)[0]


def cross_attention_with_lse_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Return out [Tq, H, D], lse [H, Tq] fp32."""
    return _forward(q, k, v, max_seqlen_q, max_seqlen_k, softmax_scale, with_lse=True)
