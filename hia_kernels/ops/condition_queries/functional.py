"""The learnable queries, shifted by what the instruction's last token says."""

from __future__ import annotations

from torch import Tensor

from ...core.call import call
from . import library as _library  # noqa: F401  (defines the op)


def condition_queries(hidden: Tensor, row_idx: Tensor, weight: Tensor, bias: Tensor | None, queries: Tensor) -> Tensor:
    """Condition the learnable queries on one token per sample: ``Q + Linear(h_N)`` (paper, Eq. 2).

    Args:
        hidden:  [T, C] hidden states of the packed tokens, fp32, fp16, bf16 or fp64; rows may be strided.
        row_idx: [B] int64 in ``[0, T)``, or int32, which is converted: the row of each sample's last instruction token.
            Values are checked on the CPU; elsewhere only with ``HIA_DEBUG=1``.
        weight:  [D, C], dtype of ``hidden``.
        bias:    [D], dtype of ``hidden``, or None.
        queries: [M, D], dtype of ``hidden``.

    Returns:
        [B, M, D], dtype of ``hidden``; differentiable in everything but ``row_idx``.

    Raises:
        ValueError: shapes, devices or row indices that don't fit. TypeError: unsupported or mixed dtypes.

    Cost: 2*B*C*D FLOPs; (B*C + D*C + M*D + B*M*D) * itemsize bytes: bandwidth-bound.
    """
    return call("condition_queries", hidden, row_idx, weight, bias, queries)
