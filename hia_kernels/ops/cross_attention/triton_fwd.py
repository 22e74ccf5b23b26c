"""Triton forward of ``cross_attention``: FlashAttention-2 (Dao 2023, algorithm 1) over packed sequences, with split-KV.

Scores stay in registers, blocks of keys are visited in order, and the sums are rescaled when a row's maximum grows
(online softmax, Milakov and Gimelshein 2018); they are divided once, at the end. Wider heads and fp32 are served by
``triton_unfused_fwd``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.triton_math import dot
from ...core.tuning import cdiv
from .triton_split import (
    PACKING,
    combine,
    count_splits,
    family_of,
    fill_rest,
    finite_or_zero,
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
from .triton_unfused_fwd import unfused_fwd

LOG2E = 1.4426950408889634
# BLOCK_M, BLOCK_N, num_warps, num_stages for head_dim up to the key: as large as the registers allow, and independent
# of the batch, because a sum in another order would change a sequence's bits
BLOCKS = {
    "amd": {128: (128, 64, 8, 2), 256: (128, 32, 8, 1)},
    "ampere": {32: (128, 64, 8, 2), 128: (128, 64, 8, 3)},
    "hopper": {128: (64, 64, 4, 3), 256: (128, 64, 8, 2)},
    "blackwell": {128: (128, 128, 8, 2), 256: (64, 64, 8, 2)},
}
BLOCK_NAMES = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
UNFUSED_NAMES = ("BLOCK_M", "BLOCK_N", "BLOCK_C", "BLOCK_K", "BLOCK_D", "num_warps", "num_stages")
# what a tuning tries beside the blocks above, by how a key begins: all fit Hopper's registers without spilling. Blocks
# of 64 queries with four warps share a multiprocessor: one multiplies while the other exponentiates.
CANDIDATES = {
    "fwd-d128-": [
        {**dict(zip(BLOCK_NAMES, blocks, strict=True)), "TAIL_IN_LOOP": tail}
        for *blocks, tail in (
            (64, 64, 4, 3, 1),
            (128, 64, 8, 3, 0),
            (128, 64, 8, 3, 1),
            (128, 64, 8, 4, 0),
            (64, 64, 4, 2, 0),
            (128, 128, 8, 2, 0),
            (64, 128, 4, 2, 0),
        )
    ],
    "fwd-d256-": [
        {**dict(zip(BLOCK_NAMES, blocks, strict=True)), "TAIL_IN_LOOP": tail}
        for *blocks, tail in ((128, 64, 8, 2, 1), (64, 64, 8, 2, 0), (64, 64, 8, 3, 0), (128, 32, 8, 3, 0))
    ],
    "fwd-unfused-": [
        dict(zip(UNFUSED_NAMES, blocks, strict=True))
        for blocks in (
            (128, 128, 64, 64, 128, 8, 3),
            (128, 128, 64, 64, 128, 8, 4),
            (128, 128, 128, 128, 128, 8, 2),
            (128, 256, 64, 64, 128, 8, 3),
            (64, 128, 64, 64, 128, 4, 3),
            (64, 128, 64, 64, 128, 4, 4),
        )
    ],
}


@triton.jit
def _attend(
    q,  # [BLOCK_M, BLOCK_D]
    k_ptrs,  # [BLOCK_N, BLOCK_D]
    v_ptrs,  # [BLOCK_N, BLOCK_D]
    acc,  # [BLOCK_M, BLOCK_D] fp32
    m_i,  # [BLOCK_M] fp32, maxima of scores * log2(e)
    l_i,  # [BLOCK_M] fp32
    mask_n,  # [BLOCK_N]
    offs_d,  # [BLOCK_D]
    scale_log2e,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add one block of keys, the sums so far rescaled to the new maximum."""
    k = load_rows(k_ptrs, mask_n, offs_d, D, BLOCK_D, MASKED)
    scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    seen = tl.where(mask_n[None, :], scores, float("-inf")) if MASKED else scores
    m_new = tl.maximum(m_i, tl.max(seen, axis=1) * scale_log2e)  # [BLOCK_M]
    shift = finite_or_zero(m_new)
    p = tl.exp2(scores * scale_log2e - shift[:, None])  # [BLOCK_M, BLOCK_N]
    if MASKED:
        p = tl.where(mask_n[None, :], p, 0.0)
    alpha = tl.exp2(m_i - shift)  # [BLOCK_M]
    v = load_rows(v_ptrs, mask_n, offs_d, D, BLOCK_D, MASKED)
    acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, m_new, l_i * alpha + tl.sum(p, axis=1)


@triton.jit
def _attend_split(
    q,  # [BLOCK_M, BLOCK_D]
    k_ptr,  # first key of the split, one head
    v_ptr,
    first,
    last,
    offs_d,  # [BLOCK_D]
    scale_log2e,
    stride_k_t,
    stride_v_t,
    D: tl.constexpr,
    IS_CARRIED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL_IN_LOOP: tl.constexpr,
):
    """Add the keys from ``first`` to ``last``, block by block, the rest masked; return sums and maxima.

    With TAIL_IN_LOOP the last, partial block is one of the loop's, whose copies overlap products, and all are masked.
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = offs_n[:, None] * stride_k_t + offs_d[None, :]  # [BLOCK_N, BLOCK_D]; int32, see row_contiguous
    offs_v = offs_n[:, None] * stride_v_t + offs_d[None, :]  # [BLOCK_N, BLOCK_D]

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    end = last if TAIL_IN_LOOP else last - BLOCK_N + 1
    for start_n in range(first, end, BLOCK_N):
        passed = 0 if IS_CARRIED else tl.cast(start_n - first, tl.int64)
        acc, m_i, l_i = _attend(
            q,
            k_ptr + passed * stride_k_t + offs_k,
            v_ptr + passed * stride_v_t + offs_v,
            acc,
            m_i,
            l_i,
            offs_n < last - start_n,
            offs_d,
            scale_log2e,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            MASKED=TAIL_IN_LOOP,
        )
        if IS_CARRIED:
            k_ptr += BLOCK_N * stride_k_t
            v_ptr += BLOCK_N * stride_v_t
    rest = 0 if TAIL_IN_LOOP else tl.maximum(last - first, 0) % BLOCK_N
    if rest > 0:
        passed = 0 if IS_CARRIED else tl.cast(last - first - rest, tl.int64)
        acc, m_i, l_i = _attend(
            q,
            k_ptr + passed * stride_k_t + offs_k,
            v_ptr + passed * stride_v_t + offs_v,
            acc,
            m_i,
            l_i,
            offs_n < rest,
            offs_d,
            scale_log2e,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            MASKED=True,
        )
    return acc, m_i, l_i


@triton.jit(
    do_not_specialize=["H", "tokens", *PACKING, "sequences", "tiles_m", "grid_splits", "num_splits", "max_splits"]
)
def _cross_attention_fwd_kernel(
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [Tk, H, D]
    v_ptr,  # [Tk, H, D]
    cu_q_ptr,  # [B + 1]
    cu_k_ptr,  # [B + 1]
    out_ptr,  # [Tq, H, D]
    lse_ptr,  # [H, Tq] fp32, only with HAS_LSE
    partial_ptr,  # [grid_splits, Tq, H, D] fp32, not divided by the sum yet, only with IS_SPLIT
    partial_m_ptr,  # [grid_splits, H, Tq] fp32, only with IS_SPLIT: maxima of scores * log2(e)
    partial_l_ptr,  # [grid_splits, H, Tq] fp32, only with IS_SPLIT: sums
    tokens,  # Tq
    tokens_k,
    longest_q,
    longest_k,
    sequences,
    tiles_m,
    grid_splits,  # of the longest sequence
    num_splits,
    max_splits,
    H,
    scale_log2e,
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    stride_v_t,
    stride_v_h,
    D: tl.constexpr,
    HAS_LSE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    MIN_KEYS_PER_SPLIT: tl.constexpr,
    IS_CARRIED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL_IN_LOOP: tl.constexpr,
):
    """Attend from a block of one sequence's queries to a split of its keys, one head.

    grid = (tiles_m * grid_splits * H * B,).
    """
    LN2: tl.constexpr = 0.6931471805599453
    pid = tl.program_id(0)
    start_m = pid % tiles_m * BLOCK_M
    split = pid // tiles_m % grid_splits
    h = (pid // (tiles_m * grid_splits) % H).to(tl.int64)
    b = pid // (tiles_m * grid_splits * H)
    start_q, len_q = sequence_of(cu_q_ptr, b, tokens, longest_q)
    start_k, len_k = sequence_of(cu_k_ptr, b, tokens_k, longest_k)
    own_splits = count_splits(len_k, num_splits, max_splits, MIN_KEYS_PER_SPLIT) if IS_SPLIT else 1
    offs_d = tl.arange(0, BLOCK_D)
    if (start_m == 0) & (split == 0):
        fill_rest(out_ptr, lse_ptr, cu_q_ptr, b, sequences, tokens, start_q + len_q, h, H, offs_d, D, HAS_LSE, BLOCK_M)
    if (start_m >= len_q) | (split >= own_splits):
        return
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < len_q - start_m
    start_q += start_m
    q_ptr += start_q * stride_q_t + h * stride_q_h
    q = load_rows(q_ptr + (offs_m[:, None] * stride_q_t + offs_d[None, :]), mask_m, offs_d, D, BLOCK_D)
    first, last = split_bounds(split, own_splits, len_k, BLOCK_N)
    k_ptr += (start_k + first) * stride_k_t + h * stride_k_h
    v_ptr += (start_k + first) * stride_v_t + h * stride_v_h
    acc, m_i, l_i = _attend_split(
        q,
        k_ptr,
        v_ptr,
        first,
        last,
        offs_d,
        scale_log2e,
        stride_k_t,
        stride_v_t,
        D,
        IS_CARRIED,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        TAIL_IN_LOOP,
    )

    row = h * tokens + start_q + offs_m  # [BLOCK_M]
    offs_out = start_q * H * D + h * D + (offs_m[:, None] * (H * D) + offs_d[None, :])  # [BLOCK_M, BLOCK_D]
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    if own_splits > 1:
        before = tl.cast(split, tl.int64) * H * tokens  # rows of the splits before
        tl.store(partial_m_ptr + before + row, m_i, mask=mask_m)
        tl.store(partial_l_ptr + before + row, l_i, mask=mask_m)
        tl.store(partial_ptr + before * D + offs_out, acc, mask=mask)
    else:
        l_i = tl.where(len_k == 0, 1.0, l_i)  # scores that are all -inf give 0 / 0
        if HAS_LSE:
            tl.store(lse_ptr + row, (m_i + tl.log2(l_i)) * LN2, mask=mask_m)
        tl.store(out_ptr + offs_out, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def is_fused(q):
    """Say whether a block of the head fits beside its accumulators; fp32 products would take too many registers."""
    return q.element_size() == 2 and q.shape[2] <= max(BLOCKS[family_of(q.device)])


def blocks_of(table, q):
    """Return the entry of a table like ``BLOCKS`` for this device and head_dim."""
    sizes = table[family_of(q.device)]
    return sizes[min(limit for limit in sizes if q.shape[2] <= limit)]


def _config(q):
    heuristic = {**dict(zip(BLOCK_NAMES, blocks_of(BLOCKS, q), strict=True)), "TAIL_IN_LOOP": 0}
    return tuning.pick("cross_attention", tuning_key("fwd", q), q.device, heuristic)


def _fused_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, out, lse):
    """Fill ``out`` and, if it is not None, ``lse``."""
    if softmax_scale < 0:  # the kernel takes a row's maximum before it scales
        q, softmax_scale = -q, -softmax_scale
    q, k, v = row_contiguous(q, k, v)
    tokens, heads, head_dim = q.shape
    config = _config(q)
    tiles_m = cdiv(max_seqlen_q, config["BLOCK_M"])
    heuristic = split_heuristic(q, config["BLOCK_M"], 1, resident_programs(config))
    splits = heuristic.count(max_seqlen_k)
    partial, partial_m, partial_l = partial_results(splits, out)
    packing = packing_arguments(k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    sequences = cu_seqlens_q.numel() - 1
    _cross_attention_fwd_kernel[(tiles_m * splits * heads * sequences,)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        **packing,
        sequences=sequences,
        out_ptr=out,
        lse_ptr=lse,
        partial_ptr=partial,
        partial_m_ptr=partial_m,
        partial_l_ptr=partial_l,
        tokens=tokens,
        tiles_m=tiles_m,
        H=heads,
        scale_log2e=softmax_scale * LOG2E,
        **strides_of(q=q, k=k, v=v),
        **heuristic.arguments(splits),
        D=head_dim,
        HAS_LSE=lse is not None,
        IS_CARRIED=is_carried(q.device),
        BLOCK_D=max(16, tuning.bucket(head_dim)),
        **config,
        enable_fp_fusion=True,
    )
    if splits > 1:
        combine(partial, (partial_m, partial_l), out, lse, packing, heuristic, natural=False)


def has_no_pairs(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k):
    """Say whether no query has a key by sizes alone: then no program would run, and none fill a result."""
    return 0 in (q.numel(), k.numel(), cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k)


def _fill(out, lse, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale):
    """Fill ``out`` and, if it is not None, ``lse``, by the fused or the unfused kernels."""
    if has_no_pairs(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k):
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
        return
    max_seqlen_q, max_seqlen_k = min(max_seqlen_q, q.shape[0]), min(max_seqlen_k, k.shape[0])
    launch = _fused_fwd if is_fused(q) else unfused_fwd
    launch(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, out, lse)


def cross_attention_fwd(q, *rest):
    """Return out, [Tq, H, D] of the dtype of ``q``."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _fill(out, None, q, *rest)
    return out


def cross_attention_with_lse_fwd(q, *rest):
    """Return out, [Tq, H, D], and lse, [H, Tq] fp32."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    _fill(out, lse, q, *rest)
    return out, lse
