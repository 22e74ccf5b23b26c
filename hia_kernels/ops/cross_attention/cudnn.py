"""``cross_attention`` by cuDNN's attention, as PyTorch's SDPA calls it: sequences of equal lengths.

PyTorch has packed cuDNN attention (``torch.ops.aten._cudnn_attention_forward``), and uses it nowhere
(``torch/nn/attention/varlen.py``, ``_should_use_cudnn``): nor do we. Its gradients have no fixed order of sums: PyTorch
refuses them in its deterministic mode, and ``auto`` never takes them (``measured.NOT_DETERMINISTIC``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.fresh import reshaped
from . import external

MAX_HEAD_DIM = 128  # pytorch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp; more on some devices and versions


def unavailable_reasons() -> list[str]:
    """Return why this machine has no cuDNN attention."""
    found = external.unavailable_reasons()
    if not found and not torch.backends.cudnn.is_available():
        found.append("this build of torch has no cuDNN")
    elif not found and not torch.backends.cudnn.enabled:
        found.append("torch.backends.cudnn.enabled is off")
    return found


def unsupported_reasons(
    function: str, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, **rest: Any
) -> list[str]:
    """Return why cuDNN can't serve a call."""
    found = external.unsupported_reasons(max_head_dim=MAX_HEAD_DIM, **rest)
    if found:
        return found
    q, k = rest["q"], rest["k"]
    if not (external.is_even(q, cu_seqlens_q, max_seqlen_q) and external.is_even(k, cu_seqlens_k, max_seqlen_k)):
        found.append("all sequences must have max_seqlen_q queries and max_seqlen_k keys")
    return found + external.too_old_reasons(q, (8, 0))


def _batched(x: Tensor, length: int) -> Tensor:
    """Return [B, H, L, D], strided."""
    return external.readable(x).unflatten(0, (-1, length)).transpose(1, 2)


def _packed(x: Tensor, shape: torch.Size) -> Tensor:
    return reshaped(x.transpose(1, 2).contiguous(), *shape)


def cross_attention_fwd(*args: Any) -> Tensor:
    """Return out [Tq, H, D], dtype of ``q``."""
    return _forward(*args, with_lse=False)[0]


def cross_attention_with_lse_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    """Return out [Tq, H, D], lse [H, Tq] fp32."""
    return _forward(*args, with_lse=True)


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, with_lse: bool) -> tuple[Tensor, Tensor]:
    _, _, max_seqlen_q, max_seqlen_k, softmax_scale = rest
    lengths = (max_seqlen_q, max_seqlen_k, max_seqlen_k)
    triple = [_batched(x, length) for x, length in zip((q, k, v), lengths, strict=True)]
    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = kernel(*triple, None, with_lse, 0.0, False, False, scale=softmax_scale)
    out = _packed(out, q.shape)
    if not with_lse:
        return out, lse
    tokens, heads, _ = q.shape
    lse = lse.reshape(-1, heads, max_seqlen_q)  # some versions have a last axis of 1
    return out, reshaped(lse.transpose(0, 1).clone(memory_format=torch.contiguous_format), heads, tokens)


def cross_attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v."""
    _, _, max_seqlen_q, max_seqlen_k, softmax_scale = rest
    lengths = (max_seqlen_q, max_seqlen_q, max_seqlen_k, max_seqlen_k, max_seqlen_q)
    given = [_batched(x, length) for x, length in zip((dout, q, k, v, out), lengths, strict=True)]
    lse = lse.unflatten(1, (-1, max_seqlen_q)).transpose(0, 1).contiguous()  # [B, H, Lq]
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, which there is none of
    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    none: Any = None
    lengths_k = (none, none, max_seqlen_q, max_seqlen_k)
    grads = kernel(*given, lse, seed, seed, none, *lengths_k, 0.0, False, scale=softmax_scale)
    dq, dk, dv = (_packed(grad, x.shape) for grad, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv
