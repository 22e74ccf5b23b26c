"""Contracts of ``hia::cross_attention``, ``hia::cross_attention_with_lse`` and their backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...core import varlen
from ...core.checks import FLOATS, INDEX_DTYPES, Arg, Contract, check_not_negative, like, statistics

MAX_HEAD_DIM = 640

_INPUTS = {
    "q": Arg("Tq H D", FLOATS),
    "k": like("q", "Tk H D"),
    "v": like("q", "Tk H D"),
    "cu_seqlens_q": Arg("B+1", INDEX_DTYPES),
    "cu_seqlens_k": Arg("B+1", INDEX_DTYPES),
}
_RESULTS = {
    "dout": like("q", "Tq H D"),
    "dlse": statistics("q", "H Tq", optional=True),
    "out": like("q", "Tq H D"),
    "lse": statistics("q", "H Tq"),
}


class _Packed(Contract):
    """The contract of packed attention: head_dim and max_seqlen too."""

    def __call__(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        sizes = super().__call__(arguments)
        head_dim = sizes["D"]
        if head_dim % 16 or not 16 <= head_dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"hia::{self.op}: q must have head_dim a multiple of 16 in [16, {MAX_HEAD_DIM}], got {head_dim}"
            )
        if sizes["B+1"] < 1:
            raise ValueError(f"hia::{self.op}: cu_seqlens_q must hold at least the leading 0, got an empty tensor")
        check_not_negative(self.op, "max_seqlen_q", arguments["max_seqlen_q"])
        check_not_negative(self.op, "max_seqlen_k", arguments["max_seqlen_k"])
        return sizes


check = _Packed("cross_attention", **_INPUTS)
check_with_lse = _Packed("cross_attention_with_lse", **_INPUTS)
check_bwd = _Packed("cross_attention_bwd", **_INPUTS, **_RESULTS)


def check_values(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **rest: Any,
) -> None:
    """Check the lengths."""
    varlen.check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    varlen.check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)


def scale_or_default(q: Any, softmax_scale: float | None) -> float | None:
    """Return ``head_dim ** -0.5`` for None; a ``q`` without a head_dim is for the checks to refuse."""
    if softmax_scale is not None:
        return softmax_scale
    return max(q.shape[-1], 1) ** -0.5 if isinstance(q, torch.Tensor) and q.dim() else 1.0
