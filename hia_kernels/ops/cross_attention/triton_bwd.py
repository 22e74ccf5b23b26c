"""Triton backward of ``cross_attention``: p recomputed from the saved log-sum-exp (Dao 2023, algorithm 2), no atomics.

dq is summed by blocks of queries and dk, dv by blocks of keys, in two kernels, so that every sum has one order;
algorithm 2 has one loop over keys and adds to dq with atomics. Wider heads and fp32 are served by
``triton_unfused_bwd``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.triton_math import dot
from ...core.tuning import cdiv
from .triton_fwd import BLOCK_NAMES, LOG2E, blocks_of, has_no_pairs, is_fused
from .triton_split import (
    PACKING,
    combine,
    count_splits,
    fill_rest,
    is_carried,
    load_rows,
    packing_arguments,
    partial_results,
    resident_programs,
    row_contiguous,
    sequence_of,
    split_bounds,
    split_heuristic,
    strides_of,
    tuning_key,
)
from .triton_unfused_bwd import unfused_bwd

# BLOCK_M, BLOCK_N, num_warps, num_stages for head_dim up to the key; M are queries, N keys
DQ_BLOCKS = {
    "amd": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 4, 1)},
    "ampere": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2)},
    "hopper": {128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    "blackwell": {128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
}
DKV_BLOCKS = {
    "amd": {64: (32, 128, 8, 2), 128: (32, 64, 4, 2), 256: (16, 64, 8, 2)},
    "ampere": {64: (64, 128, 8, 2), 128: (64, 64, 8, 2)},
    "hopper": {128: (64, 128, 8, 2), 256: (32, 64, 8, 2)},
    "blackwell": {128: (32, 128, 8, 3), 256: (32, 64, 8, 2)},
}
CANDIDATES = {  # as the forward's
    "dq-d128-": [
        dict(zip(BLOCK_NAMES, blocks, strict=True))
        for blocks in ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (128, 32, 8, 4))
    ],
    "dq-d256-": [dict(zip(BLOCK_NAMES, (128, 32, 8, 2), strict=True))],
    "dkv-d128-": [
        dict(zip(BLOCK_NAMES, blocks, strict=True)) for blocks in ((64, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 4))
    ],
}


@triton.jit(do_not_specialize=["H", "tokens", *PACKING, "sequences"])
def _cross_attention_delta_kernel(
    dout_ptr,  # [T, H, D]
    out_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32
    dlse_ptr,  # [H, T] fp32
    lse_delta_ptr,  # [H, 2, T] fp32: lse * factor, delta
    cu_q_ptr,  # [B + 1]
    cu_k_ptr,  # [B + 1]
    dq_ptr,  # [T, H, D]
    dk_ptr,  # [Tk, H, D]
    dv_ptr,  # [Tk, H, D]
    tokens,  # T
    tokens_k,
    longest_q,
    longest_k,
    sequences,
    H,
    factor,
    stride_dout_t,
    stride_dout_h,
    stride_out_t,
    stride_out_h,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store each row's scaled lse and delta = sum_d dout * out - dlse; grid = (max(cdiv(T, BLOCK_T), B), H).

    Program b also fills the gradients' rows that no sequence has: the kernels that compute them have no register left.
    """
    h = tl.program_id(1).to(tl.int64)
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # int64: T * H * D may exceed 2**31
    offs_d = tl.arange(0, BLOCK_D)
    mask_t = offs_t < tokens
    mask = mask_t[:, None] & (offs_d < D)[None, :]

    dout_ptrs = dout_ptr + offs_t[:, None] * stride_dout_t + h * stride_dout_h + offs_d[None, :]  # [BLOCK_T, BLOCK_D]
    out_ptrs = out_ptr + offs_t[:, None] * stride_out_t + h * stride_out_h + offs_d[None, :]  # [BLOCK_T, BLOCK_D]
    dout = tl.load(dout_ptrs, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(dout * tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32), axis=1)  # [BLOCK_T]
    delta -= tl.load(dlse_ptr + h * tokens + offs_t, mask=mask_t, other=0.0)
    lse = tl.load(lse_ptr + h * tokens + offs_t, mask=mask_t, other=0.0)  # [BLOCK_T]
    tl.store(lse_delta_ptr + 2 * h * tokens + offs_t, lse * factor, mask=mask_t)
    tl.store(lse_delta_ptr + (2 * h + 1) * tokens + offs_t, delta, mask=mask_t)

    b = tl.program_id(0)
    if b < sequences:
        start_q, len_q = sequence_of(cu_q_ptr, b, tokens, longest_q)
        start_k, len_k = sequence_of(cu_k_ptr, b, tokens_k, longest_k)
        fill_rest(dq_ptr, None, cu_q_ptr, b, sequences, tokens, start_q + len_q, h, H, offs_d, D, False, BLOCK_T)
        fill_rest(dk_ptr, None, cu_k_ptr, b, sequences, tokens_k, start_k + len_k, h, H, offs_d, D, False, BLOCK_T)
        fill_rest(dv_ptr, None, cu_k_ptr, b, sequences, tokens_k, start_k + len_k, h, H, offs_d, D, False, BLOCK_T)


@triton.jit
def _dq_block(
    q,  # [BLOCK_M, BLOCK_D]
    dout,  # [BLOCK_M, BLOCK_D]
    k_ptrs,  # [BLOCK_N, BLOCK_D]
    v_ptrs,  # [BLOCK_N, BLOCK_D]
    acc,  # [BLOCK_M, BLOCK_D] fp32
    lse,  # [BLOCK_M], times log2(e)
    delta,  # [BLOCK_M]
    mask_n,  # [BLOCK_N]
    offs_d,  # [BLOCK_D]
    scale_log2e,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add one block of keys to dq."""
    k = load_rows(k_ptrs, mask_n, offs_d, D, BLOCK_D, MASKED)
    v = load_rows(v_ptrs, mask_n, offs_d, D, BLOCK_D, MASKED)
    scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    p = tl.exp2(scores * scale_log2e - lse[:, None])  # [BLOCK_M, BLOCK_N]
    if MASKED:
        p = tl.where(mask_n[None, :], p, 0.0)
    dp = dot(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    ds = p * (dp - delta[:, None])
    return dot(ds.to(k.dtype), k, acc)


@triton.jit(do_not_specialize=["H", "tokens", *PACKING, "tiles_m", "grid_splits", "num_splits", "max_splits"])
def _cross_attention_bwd_dq_kernel(
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [Tk, H, D]
    v_ptr,  # [Tk, H, D]
    dout_ptr,  # [Tq, H, D]
    lse_delta_ptr,  # [H, 2, Tq] fp32: lse * log2(e), delta
    cu_q_ptr,  # [B + 1]
    cu_k_ptr,  # [B + 1]
    dq_ptr,  # [Tq, H, D]
    partial_ptr,  # [grid_splits, Tq, H, D] fp32, only with IS_SPLIT
    tokens,  # Tq
    tokens_k,
    longest_q,
    longest_k,
    tiles_m,
    grid_splits,  # of the longest sequence
    num_splits,
    max_splits,
    H,
    scale,
    scale_log2e,
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    stride_v_t,
    stride_v_h,
    stride_dout_t,
    stride_dout_h,
    D: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    MIN_KEYS_PER_SPLIT: tl.constexpr,
    IS_CARRIED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute dq of a block of one sequence's queries, one head, over a split of its keys.

    grid = (tiles_m * grid_splits * H * B,).
    """
    pid = tl.program_id(0)
    start_m = pid % tiles_m * BLOCK_M
    split = pid // tiles_m % grid_splits
    h = (pid // (tiles_m * grid_splits) % H).to(tl.int64)
    b = pid // (tiles_m * grid_splits * H)
    start_q, len_q = sequence_of(cu_q_ptr, b, tokens, longest_q)
    start_k, len_k = sequence_of(cu_k_ptr, b, tokens_k, longest_k)
    own_splits = count_splits(len_k, num_splits, max_splits, MIN_KEYS_PER_SPLIT) if IS_SPLIT else 1
    offs_d = tl.arange(0, BLOCK_D)
    if (start_m >= len_q) | (split >= own_splits):
        return
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m = offs_m < len_q - start_m
    start_q += start_m

    q_ptr += start_q * stride_q_t + h * stride_q_h
    dout_ptr += start_q * stride_dout_t + h * stride_dout_h
    lse_delta_ptr += 2 * h * tokens + start_q
    q = load_rows(q_ptr + (offs_m[:, None] * stride_q_t + offs_d[None, :]), mask_m, offs_d, D, BLOCK_D)
    dout = load_rows(dout_ptr + (offs_m[:, None] * stride_dout_t + offs_d[None, :]), mask_m, offs_d, D, BLOCK_D)
    lse = tl.load(lse_delta_ptr + offs_m, mask=mask_m, other=float("inf"))  # [BLOCK_M]
    delta = tl.load(lse_delta_ptr + tokens + offs_m, mask=mask_m, other=0.0)  # [BLOCK_M]

    first, last = split_bounds(split, own_splits, len_k, BLOCK_N)
    k_ptr += (start_k + first) * stride_k_t + h * stride_k_h
    v_ptr += (start_k + first) * stride_v_t + h * stride_v_h
    offs_k = offs_n[:, None] * stride_k_t + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
    offs_v = offs_n[:, None] * stride_v_t + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in range(first, last - BLOCK_N + 1, BLOCK_N):
        passed = 0 if IS_CARRIED else tl.cast(start_n - first, tl.int64)
        acc = _dq_block(
            q,
            dout,
            k_ptr + passed * stride_k_t + offs_k,
            v_ptr + passed * stride_v_t + offs_v,
            acc,
            lse,
            delta,
            offs_n < last - start_n,
            offs_d,
            scale_log2e,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            MASKED=False,
        )
        if IS_CARRIED:
            k_ptr += BLOCK_N * stride_k_t
            v_ptr += BLOCK_N * stride_v_t
    rest = tl.maximum(last - first, 0) % BLOCK_N
    if rest > 0:
        passed = 0 if IS_CARRIED else tl.cast(last - first - rest, tl.int64)
        acc = _dq_block(
            q,
            dout,
            k_ptr + passed * stride_k_t + offs_k,
            v_ptr + passed * stride_v_t + offs_v,
            acc,
            lse,
            delta,
            offs_n < rest,
            offs_d,
            scale_log2e,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            MASKED=True,
        )

    offs_dq = start_q * H * D + h * D + (offs_m[:, None] * (H * D) + offs_d[None, :])  # [BLOCK_M, BLOCK_D]
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    if own_splits > 1:
        tl.store(partial_ptr + tl.cast(split, tl.int64) * tokens * H * D + offs_dq, acc * scale, mask=mask)
    else:
        tl.store(dq_ptr + offs_dq, (acc * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["H", "tokens", *PACKING, "tiles_n"])
def _cross_attention_bwd_dkv_kernel(
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [Tk, H, D]
    v_ptr,  # [Tk, H, D]
    dout_ptr,  # [Tq, H, D]
    lse_delta_ptr,  # [H, 2, Tq] fp32: lse * log2(e), delta
    cu_q_ptr,  # [B + 1]
    cu_k_ptr,  # [B + 1]
    dk_ptr,  # [Tk, H, D]
    dv_ptr,  # [Tk, H, D]
    tokens,  # Tq
    tokens_k,
    longest_q,
    longest_k,
    tiles_n,
    H,
    scale,
    scale_log2e,
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    stride_v_t,
    stride_v_h,
    stride_dout_t,
    stride_dout_h,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute dk and dv of a block of one sequence's keys, one head, scores transposed; grid = (tiles_n * H * B,)."""
    pid = tl.program_id(0)
    start_n = pid % tiles_n * BLOCK_N
    h = (pid // tiles_n % H).to(tl.int64)
    b = pid // (tiles_n * H)
    start_q, len_q = sequence_of(cu_q_ptr, b, tokens, longest_q)
    start_k, len_k = sequence_of(cu_k_ptr, b, tokens_k, longest_k)
    offs_d = tl.arange(0, BLOCK_D)
    if start_n >= len_k:
        return
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < len_k - start_n
    start_k += start_n

    k_ptrs = k_ptr + start_k * stride_k_t + h * stride_k_h + (offs_n[:, None] * stride_k_t + offs_d[None, :])
    k = load_rows(k_ptrs, mask_n, offs_d, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v_ptrs = v_ptr + start_k * stride_v_t + h * stride_v_h + (offs_n[:, None] * stride_v_t + offs_d[None, :])
    v = load_rows(v_ptrs, mask_n, offs_d, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    q_ptr += start_q * stride_q_t + h * stride_q_h
    dout_ptr += start_q * stride_dout_t + h * stride_dout_h
    offs_q = offs_m[:, None] * stride_q_t + offs_d[None, :]  # [BLOCK_M, BLOCK_D]
    offs_dout = offs_m[:, None] * stride_dout_t + offs_d[None, :]  # [BLOCK_M, BLOCK_D]
    lse_delta_ptr += 2 * h * tokens + start_q

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start_m in range(0, len_q, BLOCK_M):
        mask_m = start_m + offs_m < len_q
        q = load_rows(q_ptr + offs_q, mask_m, offs_d, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        dout = load_rows(dout_ptr + offs_dout, mask_m, offs_d, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        # both products first: one runs during the other's exponentials
        scores = dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
        dp = dot(v, tl.trans(dout), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
        lse = tl.load(lse_delta_ptr + start_m + offs_m, mask=mask_m, other=float("inf"))  # [BLOCK_M]
        p = tl.exp2(scores * scale_log2e - lse[None, :])  # [BLOCK_N, BLOCK_M]; 0 beyond the queries
        dv = dot(p.to(dout.dtype), dout, dv)
        delta = tl.load(lse_delta_ptr + tokens + start_m + offs_m, mask=mask_m, other=0.0)  # [BLOCK_M]
        ds = p * (dp - delta[None, :])
        dk = dot(ds.to(q.dtype), q, dk)
        q_ptr += BLOCK_M * stride_q_t
        dout_ptr += BLOCK_M * stride_dout_t

    offsets = (start_k * H + h) * D + (offs_n[:, None] * (H * D) + offs_d[None, :])  # [BLOCK_N, BLOCK_D]
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    tl.store(dk_ptr + offsets, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def _config(mode, table, q):
    heuristic = dict(zip(BLOCK_NAMES, blocks_of(table, q), strict=True))
    return tuning.pick("cross_attention", tuning_key(mode, q), q.device, heuristic)


def _lse_and_delta(dout, out, lse, dlse, factor, packing, grads):
    """Return lse * factor and delta, [H, 2, Tq] fp32, and fill the rows of ``grads`` that no sequence has."""
    dq, dk, dv = grads
    sequences = packing["cu_q_ptr"].numel() - 1
    tokens, heads, head_dim = dout.shape
    lse_delta = torch.empty((heads, 2, tokens), dtype=torch.float32, device=dout.device)
    block_d = tuning.bucket(head_dim)
    block_t = max(1, 4096 // block_d)  # 32 elements a thread
    _cross_attention_delta_kernel[(max(cdiv(tokens, block_t), sequences), heads)](
        dout_ptr=dout,
        out_ptr=out,
        lse_ptr=lse.contiguous(),
        dlse_ptr=torch.zeros_like(lse) if dlse is None else dlse.contiguous(),
        lse_delta_ptr=lse_delta,
        **packing,
        dq_ptr=dq,
        dk_ptr=dk,
        dv_ptr=dv,
        sequences=sequences,
        tokens=tokens,
        H=heads,
        factor=factor,
        **strides_of(dout=dout, out=out),
        D=head_dim,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        enable_fp_fusion=True,
    )
    return lse_delta


def _fused_bwd(q, k, v, dout, lse_delta, cu_seqlens_q, cu_seqlens_k, max_seqlens, softmax_scale, grads):
    """Fill ``grads``, those of q, k, v."""
    dq, dk, dv = grads
    tokens, heads, head_dim = q.shape
    packing = packing_arguments(k, cu_seqlens_q, cu_seqlens_k, *max_seqlens)
    batch_heads = (cu_seqlens_q.numel() - 1) * heads
    options = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "dout_ptr": dout,
        "lse_delta_ptr": lse_delta,
        **packing,
        "tokens": tokens,
        "H": heads,
        "scale": softmax_scale,
        "scale_log2e": softmax_scale * LOG2E,
        **strides_of(q=q, k=k, v=v, dout=dout),
        "D": head_dim,
        "BLOCK_D": max(16, tuning.bucket(head_dim)),
    }

    config = _config("dq", DQ_BLOCKS, q)
    tiles_m = cdiv(max_seqlens[0], config["BLOCK_M"])
    heuristic = split_heuristic(q, config["BLOCK_M"], 1, resident_programs(config))
    splits = heuristic.count(max_seqlens[1])
    partial = partial_results(splits, dq)[0]
    _cross_attention_bwd_dq_kernel[(tiles_m * splits * batch_heads,)](
        dq_ptr=dq,
        partial_ptr=partial,
        tiles_m=tiles_m,
        IS_CARRIED=is_carried(q.device),
        **heuristic.arguments(splits),
        **options,
        **config,
        enable_fp_fusion=True,
    )
    if splits > 1:
        combine(partial, None, dq, None, packing, heuristic, natural=False)

    config = _config("dkv", DKV_BLOCKS, q)
    tiles_n = cdiv(max_seqlens[1], config["BLOCK_N"])
    _cross_attention_bwd_dkv_kernel[(tiles_n * batch_heads,)](
        dk_ptr=dk, dv_ptr=dv, tiles_n=tiles_n, **options, **config, enable_fp_fusion=True
    )


def cross_attention_bwd(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale
):
    """Return the gradients of q, k, v."""
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    if has_no_pairs(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k):
        return tuple(grad.zero_() for grad in grads)
    max_seqlen_q, max_seqlen_k = min(max_seqlen_q, q.shape[0]), min(max_seqlen_k, k.shape[0])
    q, k, v, dout, out = row_contiguous(q, k, v, dout, out)
    fused = is_fused(q)
    packing = packing_arguments(k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    lse_delta = _lse_and_delta(dout, out, lse, dlse, LOG2E if fused else 1.0, packing, grads)
    (_fused_bwd if fused else unfused_bwd)(
        q, k, v, dout, lse_delta, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), softmax_scale, grads
    )
    return tuple(grads)
