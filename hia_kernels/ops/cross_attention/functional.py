"""Attention of packed queries over packed keys of other lengths."""

from __future__ import annotations

from torch import Tensor

from ...core.call import call
from . import library as _library  # noqa: F401  (defines the ops)
from .checks import scale_or_default


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
    accumulation in fp32 (fp64 for fp64 inputs). Deterministic, backward too, on a CPU for one
    number of threads (docs/conventions.md, Bits); in the Triton kernels a sequence has the bits that it has alone,
    whatever it is packed with.

    Args:
        q: [Tq, H, D] fp32, fp16, bf16 or fp64; D a multiple of 16 in [16, 640]; any strides.
        k: [Tk, H, D], dtype of ``q``; any strides.
        v: [Tk, H, D], dtype of ``q``; any strides.
        cu_seqlens_q: [B + 1] int32, starts at 0, does not decrease, ends at Tq; int64 is converted. Values are checked
            on the CPU; elsewhere only with ``HIA_DEBUG=1``, since reading them makes the host wait.
        cu_seqlens_k: [B + 1] int32, likewise, ends at Tk.
        max_seqlen_q: at least the longest query sequence, in tokens; an int, so that nothing synchronises.
        max_seqlen_k: at least the longest key sequence. Where values are not checked, the Triton kernels take a longer
            sequence's first rows, and what is no sequence's is zero.
        softmax_scale: None means ``D ** -0.5``.

    Returns:
        [Tq, H, D] contiguous, dtype of ``q``; zero where a sequence has no keys. Differentiable in q, k, v.

    Raises:
        ValueError: shapes, devices or cu_seqlens that don't fit. TypeError: unsupported or mixed dtypes,
            or a length that is no int.

    Cost: 4*Tq*Lk*H*D FLOPs; (2*Tq + 2*Tk)*H*D * itemsize bytes.
    """
    scale = scale_or_default(q, softmax_scale)
    return call("cross_attention", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)


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
    scale = scale_or_default(q, softmax_scale)
    return call("cross_attention_with_lse", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
