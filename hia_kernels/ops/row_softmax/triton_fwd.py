"""Triton forward of ``row_softmax``: whole rows in registers, or longer ones in chunks, by online softmax.

The long kernel's first pass is algorithm 3 of Milakov and Gimelshein (2018), a chunk at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.tuning import cdiv

WHOLE_ROW = 16384  # longest row kept in registers: 32 fp32 values in each of 512 threads
TILE = 4096  # elements of a block of short rows: 32 in each of 128 threads


@triton.jit(do_not_specialize=["R"])
def _row_softmax_fwd_kernel(
    scores_ptr,  # [R, N]
    p_ptr,  # [R, N]; may be scores_ptr
    lse_ptr,  # [R] fp32
    R,
    N,
    scale,
    stride_scores_r,
    stride_p_r,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute p and lse of rows of at most BLOCK_N; grid = (cdiv(R, BLOCK_R),)."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # int64: R * N may exceed 2**31
    offs_n = tl.arange(0, BLOCK_N)
    mask_r = offs_r < R
    mask = mask_r[:, None] & (offs_n < N)[None, :]

    x = tl.load(scores_ptr + offs_r[:, None] * stride_scores_r + offs_n[None, :], mask=mask, other=0.0)
    x = tl.where(mask, x.to(tl.float32) * scale, float("-inf"))  # [BLOCK_R, BLOCK_N]
    m_i = tl.max(x, axis=1)  # [BLOCK_R]
    m_i = tl.where(m_i == float("-inf"), 0.0, m_i)  # a row of -inf: its sum is 0, not NaN
    weights = tl.exp(x - m_i[:, None])  # [BLOCK_R, BLOCK_N]
    l_i = tl.sum(weights, axis=1)  # [BLOCK_R]
    p = weights / l_i[:, None]
    tl.store(p_ptr + offs_r[:, None] * stride_p_r + offs_n[None, :], p.to(p_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + offs_r, m_i + tl.log(l_i), mask=mask_r)


@triton.jit
def _row_softmax_long_fwd_kernel(
    scores_ptr,  # [R, N]
    p_ptr,  # [R, N]; may be scores_ptr
    lse_ptr,  # [R] fp32
    N,
    scale,
    stride_scores_r,
    stride_p_r,
    BLOCK_N: tl.constexpr,
):
    """Compute one row a program in two passes over its chunks, for maximum and sum and to write; grid = (R,)."""
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    scores_ptr += row * stride_scores_r
    p_ptr += row * stride_p_r

    m_i = tl.full((), float("-inf"), tl.float32)
    l_i = tl.zeros((), tl.float32)
    for start in range(0, N, BLOCK_N):
        mask = start + offs_n < N
        x = tl.load(scores_ptr + start + offs_n, mask=mask, other=0.0).to(tl.float32) * scale
        x = tl.where(mask, x, float("-inf"))  # [BLOCK_N]
        m_new = tl.maximum(m_i, tl.max(x, axis=0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # only -inf so far: sums of 0, not NaN
        l_i = l_i * tl.exp(m_i - shift) + tl.sum(tl.exp(x - shift), axis=0)
        m_i = m_new

    m_i = tl.where(m_i == float("-inf"), 0.0, m_i)
    for start in range(0, N, BLOCK_N):
        mask = start + offs_n < N
        x = tl.load(scores_ptr + start + offs_n, mask=mask, other=0.0).to(tl.float32) * scale  # [BLOCK_N]
        p = tl.exp(x - m_i) / l_i
        tl.store(p_ptr + start + offs_n, p.to(p_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + row, m_i + tl.log(l_i))


def _launch(scores, p, lse, scale):
    """Fill p and lse; rows of ``scores`` and ``p`` are contiguous, and the two may be one tensor."""
    R, N = scores.shape
    if R == 0 or N == 0:
        lse.fill_(float("-inf"))
        return
    key = f"fwd-n{tuning.bucket(N)}"
    options = {
        "scores_ptr": scores,
        "p_ptr": p,
        "lse_ptr": lse,
        "N": N,
        "scale": scale,
        "stride_scores_r": scores.stride(0),
        "stride_p_r": p.stride(0),
    }
    if N > WHOLE_ROW:
        config = tuning.pick("row_softmax", key, scores.device, {"BLOCK_N": 4096, "num_warps": 8})
        _row_softmax_long_fwd_kernel[(R,)](**options, **config, enable_fp_fusion=True)
        return
    block_n = max(16, tuning.bucket(N))
    heuristic = {"BLOCK_R": max(1, min(16, TILE // block_n)), "num_warps": max(4, block_n // 1024)}
    config = tuning.pick("row_softmax", key, scores.device, heuristic)
    grid = (cdiv(R, config["BLOCK_R"]),)
    _row_softmax_fwd_kernel[grid](**options, R=R, BLOCK_N=block_n, **config, enable_fp_fusion=True)


def _lse_of(scores):
    return torch.empty(scores.shape[0], dtype=torch.float32, device=scores.device)


def row_softmax_fwd(scores, scale, out_dtype=None):
    """Return p in ``out_dtype``, and lse."""
    rows = scores if scores.stride(1) == 1 else scores.contiguous()
    p = torch.empty(scores.shape, dtype=out_dtype or scores.dtype, device=scores.device)
    lse = _lse_of(scores)
    _launch(rows, p, lse, scale)
    return p, lse


def row_softmax_inplace(scores, scale):
    """Write p into ``scores`` and return lse."""
    rows = scores if scores.stride(1) == 1 else scores.contiguous()
    lse = _lse_of(scores)
    _launch(rows, rows, lse, scale)
    if rows is not scores:
        scores.copy_(rows)
    return lse
