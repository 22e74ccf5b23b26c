"""``cross_attention`` by xformers' memory-efficient attention with a block-diagonal mask.

Its flash operator where it can serve, else its CUTLASS operator, which computes all gradients: the flash operator has
no deterministic ones (``IS_DETERMINISTIC``). Signatures were read in xformers 0.0.35 (``xformers/ops/fmha``).
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...core import determinism
from ...core.backend import BACKWARD
from ...core.fresh import reshaped
from . import external
from .flash_attn import problem_of

MODULE = "xformers.ops.fmha"
MAX_HEAD_DIM = 65536  # of the CUTLASS operator
MAX_FLASH_HEAD_DIM = 256
NEWEST_CUTLASS = (9, 0)  # CUDA_MAXIMUM_COMPUTE_CAPABILITY


def _load(name: str = MODULE) -> Any:
    return importlib.import_module(name)


@cache
def _has(operator: str) -> bool:
    """Tell whether an operator's C++ half is here."""
    return bool(_load(f"{MODULE}.{operator}").FwOp.is_available())


def unavailable_reasons() -> list[str]:
    """Return why xformers can't be used here."""
    found = external.unavailable_reasons()
    problem = None if found else problem_of(MODULE)
    return found if problem is None else [problem]


def _operator(function: str, q: Tensor) -> tuple[str | None, list[str]]:
    """Return the operator that serves a call; or None, and why none does."""
    capability = external.capability(q)
    backward, narrow = function.endswith(BACKWARD), q.shape[2] <= MAX_FLASH_HEAD_DIM
    if not backward and narrow and capability >= (8, 0) and _has("flash"):
        return "flash", []
    if capability <= NEWEST_CUTLASS and _has("cutlass"):
        return "cutlass", []
    what = "gradients" if backward else "this call"
    return None, [
        f"no operator of xformers serves {what} at head_dim {q.shape[2]} on sm_{capability[0]}{capability[1]}"
    ]


def unsupported_reasons(function: str, **arguments: Any) -> list[str]:
    """Return why it can't serve a call."""
    found = external.unsupported_reasons(max_head_dim=MAX_HEAD_DIM, **arguments)
    if found or problem_of(MODULE) is not None:
        return found
    return _operator(function, arguments["q"])[1]


def _mask(q: Tensor, k: Tensor, packing: external.Packing) -> Any:
    """Make the block-diagonal mask out of cu_seqlens as it lies on the device.

    Its own constructor takes lengths on the host. Kernels read ``seqstart`` and ``max_seqlen``; of ``seqstart_py`` only
    the last number is read, the number of rows.
    """
    bias = _load(f"{MODULE}.attn_bias")
    infos = [
        bias._SeqLenInfo(
            seqstart=cu_seqlens,
            max_seqlen=max_seqlen,
            min_seqlen=0,
            seqstart_py=[0] * (cu_seqlens.shape[0] - 1) + [rows.shape[0]],
        )
        for cu_seqlens, max_seqlen, rows in ((packing[0], packing[2], q), (packing[1], packing[3], k))
    ]
    return bias.BlockDiagonalMask(q_seqinfo=infos[0], k_seqinfo=infos[1])


def cross_attention_fwd(*args: Any) -> Tensor:
    """Return out [Tq, H, D], dtype of ``q``."""
    return cross_attention_with_lse_fwd(*args)[0]


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
    operator, reasons = _operator("cross_attention_with_lse", q)
    if operator is None:
        raise NotImplementedError(f"hia::cross_attention: xformers: {'; '.join(reasons)}")
    packing = external.within_rows(q, k, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
    one = [external.readable(x).detach()[None] for x in (q, k, v)]  # [1, T, H, D]
    with torch.no_grad():
        out, lse = _load().memory_efficient_attention_forward_requires_grad(
            *one, attn_bias=_mask(q, k, packing), scale=softmax_scale, op=_load(f"{MODULE}.{operator}").FwOp
        )
    out = reshaped(out.contiguous(), *q.shape)
    if operator == "flash":  # [1, H, Tq]
        lse = reshaped(lse.contiguous(), *q.shape[1::-1])
    else:  # [B, H, at least the longest]
        lse = external.packed_lse(lse, cu_seqlens_q, q.shape[0])
    external.mend_forward(out, lse, k, packing)
    return out, lse


def cross_attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v."""
    packing, softmax_scale = external.within_rows(q, k, rest[:4]), rest[4]
    mask = _mask(q, k, packing)
    dout, q, k, v, out = (external.readable(x).detach()[None] for x in (dout, q, k, v, out))
    lse = external.padded_lse(lse, packing[0], -(-packing[2] // 32) * 32)
    with torch.no_grad(), determinism.strict():
        grads = _load().memory_efficient_attention_backward(
            dout, out, lse, q, k, v, attn_bias=mask, scale=softmax_scale, op=_load(f"{MODULE}.cutlass").BwOp
        )
    dq, dk, dv = (reshaped(grad.contiguous(), *grad.shape[1:]) for grad in grads)
    external.mend_backward((dq, dk, dv), packing)
    return dq, dk, dv
