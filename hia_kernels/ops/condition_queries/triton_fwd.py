"""Triton forward of ``condition_queries``: one kernel that reads the weight once for all samples."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.triton_math import dot
from ...core.tuning import cdiv


@triton.jit(do_not_specialize=["B", "M"])
def _condition_queries_fwd_kernel(
    hidden_ptr,  # [T, C]
    row_idx_ptr,  # [B] int64
    weight_ptr,  # [D, C]
    bias_ptr,  # [D], only with HAS_BIAS
    queries_ptr,  # [M, D]
    out_ptr,  # [B, M, D]
    B,
    M,
    C,
    D,
    stride_hidden_t,
    stride_weight_d,
    stride_queries_m,
    HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Compute out[b] = queries + weight hidden[row_idx[b]] + bias; grid = (cdiv(B, BLOCK_B), cdiv(D, BLOCK_D))."""
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)  # int64: sizes may exceed 2**31
    first_b = tl.program_id(0) * BLOCK_B  # samples on the first axis, the only one that may exceed 65535
    offs_b = first_b + tl.arange(0, BLOCK_B)
    offs_c = tl.arange(0, BLOCK_C)
    mask_b, mask_d = offs_b < B, offs_d < D
    rows = tl.load(row_idx_ptr + offs_b, mask=mask_b, other=0)  # [BLOCK_B]
    hidden_ptrs = hidden_ptr + rows[:, None] * stride_hidden_t + offs_c[None, :]  # [BLOCK_B, BLOCK_C]
    weight_ptrs = weight_ptr + offs_d[:, None] * stride_weight_d + offs_c[None, :]  # [BLOCK_D, BLOCK_C]

    shift = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for start in range(0, C, BLOCK_C):
        mask_c = start + offs_c < C
        hidden = tl.load(hidden_ptrs + start, mask=mask_b[:, None] & mask_c[None, :], other=0.0)
        weight = tl.load(weight_ptrs + start, mask=mask_d[:, None] & mask_c[None, :], other=0.0)
        shift = dot(hidden, tl.trans(weight), shift)
    if HAS_BIAS:
        shift += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]

    offs_m = tl.arange(0, BLOCK_M)
    for b in range(tl.minimum(BLOCK_B, B - first_b)):
        shift_b = tl.sum(tl.where((offs_b == first_b + b)[:, None], shift, 0.0), axis=0)  # [BLOCK_D]
        for start in range(0, M, BLOCK_M):
            rows_m = start + offs_m.to(tl.int64)  # [BLOCK_M]
            mask = (rows_m < M)[:, None] & mask_d[None, :]
            queries_ptrs = queries_ptr + rows_m[:, None] * stride_queries_m + offs_d[None, :]
            out = tl.load(queries_ptrs, mask=mask, other=0.0).to(tl.float32) + shift_b[None, :]  # [BLOCK_M, BLOCK_D]
            out_ptrs = out_ptr + ((first_b + b).to(tl.int64) * M + rows_m)[:, None] * D + offs_d[None, :]
            tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def _config(hidden, samples, channels, dim):
    if hidden.dtype == torch.float32:
        heuristic = {"BLOCK_D": 16, "BLOCK_C": 32, "num_stages": 4}
    else:  # 8 KiB of the weight a stage
        block_d = 16 if dim <= 8192 else 32
        heuristic = {"BLOCK_D": block_d, "BLOCK_C": 4096 // block_d, "num_stages": 4}
    heuristic |= {"BLOCK_B": 16, "BLOCK_M": 64, "num_warps": 4}
    dtype = str(hidden.dtype).removeprefix("torch.")
    key = f"fwd-b{tuning.bucket(samples)}-c{tuning.bucket(channels)}-d{tuning.bucket(dim)}-{dtype}"
    return tuning.pick("condition_queries", key, hidden.device, heuristic)


def condition_queries_fwd(hidden, row_idx, weight, bias, queries):
    """Return out, [B, M, D], of hidden [T, C] and row_idx [B]."""
    hidden, weight, queries = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight, queries))
    B, C, (M, D) = row_idx.shape[0], hidden.shape[1], queries.shape
    out = torch.empty(B, M, D, dtype=queries.dtype, device=queries.device)
    if out.numel() == 0:
        return out
    config = _config(hidden, B, C, D)
    _condition_queries_fwd_kernel[(cdiv(B, config["BLOCK_B"]), cdiv(D, config["BLOCK_D"]))](
        hidden_ptr=hidden,
        row_idx_ptr=row_idx.contiguous(),
        weight_ptr=weight,
        bias_ptr=None if bias is None else bias.contiguous(),
        queries_ptr=queries,
        out_ptr=out,
        B=B,
        M=M,
        C=C,
        D=D,
        stride_hidden_t=hidden.stride(0),
        stride_weight_d=weight.stride(0),
        stride_queries_m=queries.stride(0),
        HAS_BIAS=bias is not None,
        **config,
        enable_fp_fusion=True,
    )
    return out
