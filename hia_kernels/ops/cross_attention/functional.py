"""Attention of packed queries over packed keys of other lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.checks import FLOATS, check_devices, check_dtypes, check_shapes
from . import library as _library  # noqa: F401  (defines the ops)

MAX_HEAD_DIM = 640


def _checked_scale(
    op: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    softmax_scale: float | None,
) -> float:
    """Raise on bad arguments; return the scale to use."""
    q, k, v = qkv
    cu_seqlens_q, cu_seqlens_k = cu_seqlens
    check_dtypes(op, q=(q, FLOATS))
    check_dtypes(op, k=(k, q.dtype), v=(v, q.dtype))
    check_dtypes(op, cu_seqlens_q=(cu_seqlens_q, torch.int32), cu_seqlens_k=(cu_seqlens_k, torch.int32))
    dims = check_shapes(
        op,
        q=(q, "Tq H D"),
        k=(k, "Tk H D"),
        v=(v, "Tk H D"),
        cu_seqlens_q=(cu_seqlens_q, "B+1"),
        cu_seqlens_k=(cu_seqlens_k, "B+1"),
    )
    check_devices(op, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    head_dim = dims["D"]
    if head_dim % 16 or not 16 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"hia::{op}: q must have head_dim a multiple of 16 in [16, {MAX_HEAD_DIM}], got {head_dim}")
    if dims["B+1"] < 1:
        raise ValueError(f"hia::{op}: cu_seqlens_q must hold at least the leading 0, got an empty tensor")
    for name, value in zip(("max_seqlen_q", "max_seqlen_k"), max_seqlens, strict=True):
        if isinstance(value, Tensor):
            raise TypeError(f"hia::{op}: {name} must be an int, got a tensor; .item() would wait for the device")
        if value < 0:
            raise ValueError(f"hia::{op}: {name} must not be negative, got {value}")
    return head_dim**-0.5 if softmax_scale is None else softmax_scale


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
) -> Tensor:
    """Compute packed (varlen) multi-head cross-attention, unmasked, Lq != Lk.

    ``softmax(softmax_scale * q k^T) v`` within each sequence: both of HiA's attentions (paper, section 3):
    queries over image features, and visual tokens over the extracted tokens. Scores, softmax and
    accumulation in fp32 (fp64 for fp64 inputs). Deterministic, backward too; in the Triton kernels a sequence has
    the bits that it has alone, whatever it is packed with.

    Args:
        q: [Tq, H, D] fp32, fp16, bf16 or fp64; D a multiple of 16 in [16, 640]; any strides.
        k: [Tk, H, D], dtype of ``q``; any strides.
        v: [Tk, H, D], dtype of ``q``; any strides.
        cu_seqlens_q: [B + 1] int32, starts at 0, does not decrease, ends at Tq. Values are checked on the
            CPU; elsewhere only with ``HIA_DEBUG=1``, since reading them makes the host wait.
        cu_seqlens_k: [B + 1] int32, likewise, ends at Tk.
        max_seqlen_q: at least the longest query sequence, in tokens; an int, so that nothing synchronises.
        max_seqlen_k: at least the longest key sequence. Where values are not checked, the Triton kernels take a longer
            sequence's first rows, and what is no sequence's is zero.
        softmax_scale: None means ``D ** -0.5``.

    Returns:
        [Tq, H, D] contiguous, dtype of ``q``; zero where a sequence has no keys. Differentiable in q, k, v.

    Raises:
        ValueError: shapes, devices or cu_seqlens that don't fit. TypeError: unsupported or mixed dtypes.

    Cost: 4*Tq*Lk*H*D FLOPs; (2*Tq + 2*Tk)*H*D * itemsize bytes.
    """
    op = "cross_attention"
    scale = _checked_scale(op, (q, k, v), (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), softmax_scale)
    arguments = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        # The backward needs the log-sum-exp; the op without it would have to compute the scores once more.
        return torch.ops.hia.cross_attention_with_lse(*arguments)[0]
    return torch.ops.hia.cross_attention(*arguments)


def cross_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`cross_attention` and the log-sum-exp of each query's scores, to combine partial results.

    Args and errors as there.

    Returns:
        out: [Tq, H, D]. lse: [H, Tq] fp32 (fp64 for fp64 inputs), natural logarithm, -inf where a sequence
        has no keys (flash-attention's varlen layout). Both are differentiable.

    Cost: as there, and H*Tq*4 bytes.
    """
    op = "cross_attention_with_lse"
    scale = _checked_scale(op, (q, k, v), (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), softmax_scale)
    return torch.ops.hia.cross_attention_with_lse(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale
    )
