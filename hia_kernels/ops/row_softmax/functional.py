"""Softmax of scaled scores row by row, with the log-sum-exp: what stands between two matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.call import call
from . import library as _library  # noqa: F401  (defines the ops)


def row_softmax(scores: Tensor, scale: float, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Compute each row's ``softmax(scale * scores)``, in the dtype of the product that comes next, and log-sum-exp.

    The middle of an attention whose two products are plain matrix products: fp32 scores come out of the first,
    bf16 or fp16 probabilities go into the second. Statistics in fp32 (fp64 for fp64 scores). Autocast changes nothing.

    Args:
        scores:    [R, N] fp32, fp16, bf16 or fp64; rows may be strided. ``N == 0`` is allowed.
        scale:     multiplies the scores; any sign.
        out_dtype: of the probabilities: fp32, fp16 or bf16, with fp64 scores fp64 too; None takes that of ``scores``.

    Returns:
        p [R, N] in ``out_dtype`` and lse [R] in fp32 (fp64 for fp64 scores), the natural logarithm of the row's
        ``sum(exp(scale * scores))``; -inf where N = 0. Both differentiable in scores. A row of -inf alone gives
        p = NaN, as ``torch.softmax`` does, and lse = -inf. A score of inf gives p = NaN too.

    Raises:
        ValueError: not two dims, or no such ``out_dtype``. TypeError: unsupported dtype.

    Cost: no matrix FLOPs; R*N * (itemsize of scores + itemsize of p) bytes: bandwidth-bound.
    """
    return call("row_softmax", scores, scale, out_dtype)


def row_softmax_(scores: Tensor, scale: float) -> Tensor:
    """Do :func:`row_softmax` in place: the probabilities overwrite the scores. For inference.

    The bits are those of :func:`row_softmax` in the scores' dtype; on a GPU only where the scores start at a multiple
    of 16 bytes with rows a multiple of 16 elements apart, or N is no multiple of 16, elsewhere to rounding.

    Args and errors as there; the rows must not overlap in memory.

    Returns:
        lse [R].

    Raises:
        RuntimeError: gradients are recorded and ``scores`` requires one.

    Cost: no matrix FLOPs; 2*R*N * itemsize bytes.
    """
    return call("row_softmax_", scores, scale)
