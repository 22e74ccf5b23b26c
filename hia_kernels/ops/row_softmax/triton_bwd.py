"""Triton backward of ``row_softmax``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.tuning import cdiv

WHOLE_ROW = 16384  # longest row of p and dp kept in registers: 32 values of each in 512 threads
TILE = 2048  # elements of each that a block of short rows holds


@triton.jit(do_not_specialize=["R"])
def _row_softmax_bwd_kernel(
    dp_ptr,  # [R, N]
    p_ptr,  # [R, N]
    dlse_ptr,  # [R] fp32, only with HAS_DLSE
    ds_ptr,  # [R, N]
    R,
    N,
    scale,
    stride_dp_r,
    stride_p_r,
    stride_ds_r,
    HAS_DLSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute ds = scale * p * (dp - sum(p * dp) + dlse), rows of at most BLOCK_N; grid = (cdiv(R, BLOCK_R),)."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # int64: R * N may exceed 2**31
    offs_n = tl.arange(0, BLOCK_N)
    mask_r = offs_r < R
    mask = mask_r[:, None] & (offs_n < N)[None, :]

    dp = tl.load(dp_ptr + offs_r[:, None] * stride_dp_r + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    p = tl.load(p_ptr + offs_r[:, None] * stride_p_r + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(p * dp, axis=1)  # [BLOCK_R]
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + offs_r, mask=mask_r, other=0.0)
    ds = scale * p * (dp - delta[:, None])  # [BLOCK_R, BLOCK_N]
    tl.store(ds_ptr + offs_r[:, None] * stride_ds_r + offs_n[None, :], ds.to(ds_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row_softmax_long_bwd_kernel(
    dp_ptr,  # [R, N]
    p_ptr,  # [R, N]
    dlse_ptr,  # [R] fp32, only with HAS_DLSE
    ds_ptr,  # [R, N]
    N,
    scale,
    stride_dp_r,
    stride_p_r,
    stride_ds_r,
    HAS_DLSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute one row a program in two passes over its chunks, to sum and to write; grid = (R,)."""
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    dp_ptr += row * stride_dp_r
    p_ptr += row * stride_p_r
    ds_ptr += row * stride_ds_r

    sums = tl.zeros((BLOCK_N,), tl.float32)  # [BLOCK_N], one per lane: reduced over threads once, at the end
    for start in range(0, N, BLOCK_N):
        mask = start + offs_n < N
        dp = tl.load(dp_ptr + start + offs_n, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N]
        sums += dp * tl.load(p_ptr + start + offs_n, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(sums, axis=0)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row)

    for start in range(0, N, BLOCK_N):
        mask = start + offs_n < N
        dp = tl.load(dp_ptr + start + offs_n, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N]
        p = tl.load(p_ptr + start + offs_n, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N]
        ds = scale * p * (dp - delta)
        tl.store(ds_ptr + start + offs_n, ds.to(ds_ptr.dtype.element_ty), mask=mask)


def row_softmax_bwd(dp, p, scale, dlse=None):
    """Return ds in the dtype of ``p``."""
    dp, p = (x if x.stride(1) == 1 else x.contiguous() for x in (dp, p))
    R, N = p.shape
    ds = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    if R == 0 or N == 0:
        return ds
    options = {
        "dp_ptr": dp,
        "p_ptr": p,
        "dlse_ptr": None if dlse is None else dlse.float().contiguous(),
        "ds_ptr": ds,
        "N": N,
        "scale": scale,
        "stride_dp_r": dp.stride(0),
        "stride_p_r": p.stride(0),
        "stride_ds_r": ds.stride(0),
        "HAS_DLSE": dlse is not None,
    }
    key = f"bwd-n{tuning.bucket(N)}"
    if N > WHOLE_ROW:
        config = tuning.pick("row_softmax", key, p.device, {"BLOCK_N": 4096, "num_warps": 8})
        _row_softmax_long_bwd_kernel[(R,)](**options, **config, enable_fp_fusion=True)
        return ds
    block_n = max(16, tuning.bucket(N))
    heuristic = {"BLOCK_R": max(1, min(16, TILE // block_n)), "num_warps": min(16, max(4, block_n // 512))}
    config = tuning.pick("row_softmax", key, p.device, heuristic)
    _row_softmax_bwd_kernel[(cdiv(R, config["BLOCK_R"]),)](
        **options, R=R, BLOCK_N=block_n, **config, enable_fp_fusion=True
    )
    return ds
