"""Triton backward of ``condition_queries``: sums over queries and samples, and a scatter of rows; cuBLAS multiplies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import onednn, tuning
from ...core.tuning import cdiv


@triton.jit(do_not_specialize=["B", "M"])
def _condition_queries_bwd_sums_kernel(
    dout_ptr,  # [B, M, D]
    partial_ptr,  # [cdiv(M, BLOCK_M), B, D] fp32, only with HAS_SHIFT: sums over BLOCK_M queries
    dqueries_ptr,  # [M, D], only with HAS_QUERIES: sums over all samples
    B,
    M,
    D,
    stride_dout_b,
    stride_dout_m,
    HAS_SHIFT: tl.constexpr,
    HAS_QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum dout over queries and over samples in one read; grid = (cdiv(M, BLOCK_M), cdiv(D, BLOCK_D))."""
    pid_m = tl.program_id(0).to(tl.int64)  # int64: B * M * D may exceed 2**31
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask = (offs_m < M)[:, None] & mask_d[None, :]
    dout_ptrs = dout_ptr + offs_m[:, None] * stride_dout_m + offs_d[None, :]  # [BLOCK_M, BLOCK_D]
    offs_partial = pid_m * B * D + offs_d  # [BLOCK_D]
    dqueries = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for _ in range(B):
        dout = tl.load(dout_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        if HAS_QUERIES:
            dqueries += dout
        if HAS_SHIFT:
            tl.store(partial_ptr + offs_partial, tl.sum(dout, axis=0), mask=mask_d)
        dout_ptrs += stride_dout_b
        offs_partial += D
    if HAS_QUERIES:
        tl.store(dqueries_ptr + offs_m[:, None] * D + offs_d[None, :], dqueries.to(dqueries_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["B", "T"])
def _condition_queries_bwd_dhidden_kernel(
    drows_ptr,  # [B, C]
    row_idx_ptr,  # [B] int64
    dhidden_ptr,  # [T, C]
    B,
    T,
    C,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum, in order, the drows[b] whose row_idx[b] is t into dhidden[t].

    grid = (cdiv(T, BLOCK_T), cdiv(C, BLOCK_C)).
    """
    first_t = tl.program_id(0).to(tl.int64) * BLOCK_T  # int64: T * C may exceed 2**31
    offs_t = first_t + tl.arange(0, BLOCK_T)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    drow_ptrs = drows_ptr + offs_c  # [BLOCK_C]
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for b in range(B):
        row = tl.load(row_idx_ptr + b)
        if (row >= first_t) & (row < first_t + BLOCK_T):
            drow = tl.load(drow_ptrs, mask=mask_c, other=0.0).to(tl.float32)  # [BLOCK_C]
            acc += tl.where((offs_t == row)[:, None], drow[None, :], 0.0)
        drow_ptrs += C
    mask = (offs_t < T)[:, None] & mask_c[None, :]
    tl.store(dhidden_ptr + offs_t[:, None] * C + offs_c[None, :], acc.to(dhidden_ptr.dtype.element_ty), mask=mask)


def _sums(dout, wants_shift, wants_queries):
    """Sum dout over queries, [B, D] fp32, and over samples, [M, D]; None where not wanted."""
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    B, M, D = dout.shape
    heuristic = {"BLOCK_M": 16, "BLOCK_D": 128, "num_warps": 4}
    config = tuning.pick("condition_queries", f"sums-d{tuning.bucket(D)}", dout.device, heuristic)
    blocks = cdiv(M, config["BLOCK_M"])
    partial = torch.empty(blocks, B, D, dtype=torch.float32, device=dout.device) if wants_shift else None
    dqueries = torch.empty(M, D, dtype=dout.dtype, device=dout.device) if wants_queries else None
    if M and D and (wants_shift or wants_queries):
        _condition_queries_bwd_sums_kernel[(blocks, cdiv(D, config["BLOCK_D"]))](
            dout_ptr=dout,
            partial_ptr=partial,
            dqueries_ptr=dqueries,
            B=B,
            M=M,
            D=D,
            stride_dout_b=dout.stride(0),
            stride_dout_m=dout.stride(1),
            HAS_SHIFT=wants_shift,
            HAS_QUERIES=wants_queries,
            **config,
            enable_fp_fusion=True,
        )
    return None if partial is None else partial.sum(0), dqueries


def _dhidden(drows, row_idx, hidden):
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    T, C = hidden.shape
    if T == 0 or C == 0:
        return dhidden
    heuristic = {"BLOCK_T": 4, "BLOCK_C": 512, "num_warps": 4}
    config = tuning.pick("condition_queries", f"dhidden-c{tuning.bucket(C)}", hidden.device, heuristic)
    _condition_queries_bwd_dhidden_kernel[(cdiv(T, config["BLOCK_T"]), cdiv(C, config["BLOCK_C"]))](
        drows_ptr=drows,
        row_idx_ptr=row_idx.contiguous(),
        dhidden_ptr=dhidden,
        B=drows.shape[0],
        T=T,
        C=C,
        **config,
        enable_fp_fusion=True,
    )
    return dhidden


def condition_queries_bwd(dout, hidden, row_idx, weight, output_mask):
    """Return the gradients of hidden, weight, bias, queries; those not in ``output_mask`` are empty."""
    dhidden, dweight, dbias = (hidden.new_empty(0) for _ in range(3))
    dshift, dqueries = _sums(dout, any(output_mask[:3]), output_mask[3])
    if output_mask[2]:
        dbias = dshift.sum(0).to(hidden.dtype)
    if any(output_mask[:2]):
        dshift = dshift.to(hidden.dtype)  # [B, D], for the products
    if output_mask[0]:
        dhidden = _dhidden(onednn.matmul(dshift, weight), row_idx, hidden)
    if output_mask[1]:
        dweight = onednn.matmul(dshift.mT, hidden[row_idx])
    return dhidden, dweight, dbias, hidden.new_empty(0) if dqueries is None else dqueries
