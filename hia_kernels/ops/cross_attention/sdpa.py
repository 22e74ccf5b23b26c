"""``cross_attention`` by the kernels behind PyTorch's SDPA on CUDA: flash (FlashAttention-2) and memory-efficient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import determinism
from ...core.fresh import reshaped
from . import external
from .external import unavailable_reasons as unavailable_reasons

MAX_FLASH_HEAD_DIM = 256  # pytorch, aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp
MAX_EFFICIENT_HEAD_DIM = 65536
LSE_PADDING = 32  # the memory-efficient kernel rounds the queries of lse up to it


def flash_unsupported_reasons(function: str, **arguments: Any) -> list[str]:
    """Return why the flash kernel can't serve a call."""
    found = external.unsupported_reasons(max_head_dim=MAX_FLASH_HEAD_DIM, **arguments)
    return found or external.too_old_reasons(arguments["q"], (8, 0))


def efficient_unsupported_reasons(function: str, **arguments: Any) -> list[str]:
    """Return why the memory-efficient kernel can't serve a call."""
    return external.unsupported_reasons(max_head_dim=MAX_EFFICIENT_HEAD_DIM, **arguments)


def flash_fwd(*args: Any) -> Tensor:
    """Return out [Tq, H, D], dtype of ``q``."""
    return flash_with_lse_fwd(*args)[0]


def flash_with_lse_fwd(
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
    q, k, v = map(external.readable, (q, k, v))
    packing = external.within_rows(q, k, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
    kernel = torch.ops.aten._flash_attention_forward
    out, lse, *_ = kernel(q, k, v, *packing, 0.0, False, False, scale=softmax_scale)
    lse = lse.contiguous()
    external.mend_forward(out, lse, k, packing)
    return out, lse


def flash_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v."""
    packing, softmax_scale = external.within_rows(q, k, rest[:4]), rest[4]
    dout, q, k, v, out = map(external.readable, (dout, q, k, v, out))
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    kernel = torch.ops.aten._flash_attention_backward
    with determinism.strict():
        grads = kernel(dout, q, k, v, out, lse, *packing, 0.0, False, state, unused, scale=softmax_scale)
    external.mend_backward(grads, packing)
    return tuple(grads)


def efficient_fwd(*args: Any) -> Tensor:
    """Return out [Tq, H, D], dtype of ``q``."""
    return efficient_with_lse_fwd(*args)[0]


def efficient_with_lse_fwd(
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
    packing = external.within_rows(q, k, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
    one = [external.readable(x)[None] for x in (q, k, v)]  # [1, T, H, D]
    kernel = torch.ops.aten._efficient_attention_forward
    out, lse, *_ = kernel(*one, None, *packing, 0.0, 0, True, scale=softmax_scale)
    out, lse = reshaped(out.contiguous(), *q.shape), external.packed_lse(lse, cu_seqlens_q, q.shape[0])
    external.mend_forward(out, lse, k, packing)
    return out, lse


def efficient_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v."""
    packing, softmax_scale = external.within_rows(q, k, rest[:4]), rest[4]
    dout, q, k, v, out = (external.readable(x)[None] for x in (dout, q, k, v, out))
    lse = external.padded_lse(lse, packing[0], -(-packing[2] // LSE_PADDING) * LSE_PADDING)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, which there is none of
    kernel = torch.ops.aten._efficient_attention_backward
    # several splits of the keys would add to dq in any order
    options = {"scale": softmax_scale, "num_splits_key": 1}
    grads = kernel(dout, q, k, v, None, out, *packing, lse, 0.0, seed, seed, 0, False, **options)
    dq, dk, dv = (reshaped(grad.contiguous(), *grad.shape[1:]) for grad in grads[:3])
    external.mend_backward((dq, dk, dv), packing)
    return dq, dk, dv
