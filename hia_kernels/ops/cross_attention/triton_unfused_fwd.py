"""Triton forward of ``cross_attention`` for wide heads and for fp32: exp(scores) by tiles, then their product with v.

Each tile is relative to its own row maxima; maxima and sums of a row's tiles are merged by the parallel form of online
softmax (Milakov and Gimelshein 2018, section 3.1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.triton_math import dot
from ...core.tuning import cdiv
from .triton_split import (
    PACKING,
    combine,
    count_splits,
    fill_rest,
    finite_or_zero,
    packing_arguments,
    partial_results,
    row_contiguous,
    sequence_of,
    split_bounds,
    split_heuristic,
    strides_of,
)
from .triton_unfused import block_sizes, launch_options, rows_product, workspace_chunks


@triton.jit(do_not_specialize=["tokens", *PACKING, "tiles_m", "tiles_n", "first_batch_head"])
def _cross_attention_scores_kernel(
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [Tk, H, D]
    cu_q_ptr,  # [B + 1]
    cu_k_ptr,  # [B + 1]
    p_ptr,  # [batch_heads, tiles_m * BLOCK_M, tiles_n * BLOCK_N]; batch_head = sequence * H + head
    m_ptr,  # [batch_heads, tiles_n, tiles_m * BLOCK_M] fp32: maxima of a tile's rows
    l_ptr,  # [batch_heads, tiles_n, tiles_m * BLOCK_M] fp32: sums of their exponentials
    tokens,  # Tq
    tokens_k,
    longest_q,
    longest_k,
    tiles_m,
    tiles_n,
    first_batch_head,
    H,
    scale,
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store a tile of exp(scores - its rows' maxima), 0 beyond the keys.

    grid = (tiles_m * tiles_n * batch_heads,).
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    tile_m = tl.program_id(0) % tiles_m
    tile_n = tl.program_id(0) // tiles_m % tiles_n
    batch_head = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    b = (first_batch_head + batch_head) // H
    start_q, len_q = sequence_of(cu_q_ptr, b, tokens, longest_q)
    start_k, len_k = sequence_of(cu_k_ptr, b, tokens_k, longest_k)
    h = (first_batch_head + batch_head) % H
    start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    if (start_m >= len_q) | (start_n >= len_k):
        return
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < len_k - start_n

    scores = rows_product(
        q_ptr + (start_q + start_m) * stride_q_t + h * stride_q_h,
        k_ptr + (start_k + start_n) * stride_k_t + h * stride_k_h,
        offs_m < len_q - start_m,
        mask_n,
        stride_q_t,
        stride_k_t,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_C,
    )
    scores = tl.where(mask_n[None, :], scores * scale, float("-inf"))  # [BLOCK_M, BLOCK_N]
    m_i = tl.max(scores, axis=1)  # [BLOCK_M]
    p = tl.exp2((scores - finite_or_zero(m_i)[:, None]) * LOG2E)  # [BLOCK_M, BLOCK_N]

    stats = (batch_head * tiles_n + tile_n) * (tiles_m * BLOCK_M) + start_m + offs_m  # [BLOCK_M]
    tl.store(m_ptr + stats, m_i)
    tl.store(l_ptr + stats, tl.sum(p, axis=1))
    columns = tiles_n * BLOCK_N
    p_ptr += (batch_head * (tiles_m * BLOCK_M) + start_m) * columns + start_n
    tl.store(p_ptr + (offs_m[:, None] * columns + offs_n[None, :]), p.to(p_ptr.dtype.element_ty))


@triton.jit(
    do_not_specialize=[
        "tokens",
        *PACKING,
        "sequences",
        "tiles_m",
        "tiles_n",
        "grid_splits",
        "num_splits",
        "max_splits",
        "first_batch_head",
    ]
)
def _cross_attention_values_kernel(
    p_ptr,  # [batch_heads, tiles_m * BLOCK_M, tiles_n * BLOCK_N]
    m_ptr,  # [batch_heads, tiles_n, tiles_m * BLOCK_M] fp32
    l_ptr,  # [batch_heads, tiles_n, tiles_m * BLOCK_M] fp32
    v_ptr,  # [Tk, H, D]
    cu_q_ptr,  # [B + 1]
    cu_k_ptr,  # [B + 1]
    out_ptr,  # [Tq, H, D]
    lse_ptr,  # [H, Tq] fp32, only with HAS_LSE
    partial_ptr,  # [grid_splits, Tq, H, D] fp32, not divided by the sum yet, only with IS_SPLIT
    partial_m_ptr,  # [grid_splits, H, Tq] fp32, only with IS_SPLIT: maxima
    partial_l_ptr,  # [grid_splits, H, Tq] fp32, only with IS_SPLIT: sums
    tokens,  # Tq
    tokens_k,
    longest_q,
    longest_k,
    sequences,
    tiles_m,
    tiles_n,
    grid_splits,  # of the longest sequence
    num_splits,
    max_splits,
    first_batch_head,
    H,
    stride_v_t,
    stride_v_h,
    D: tl.constexpr,
    HAS_LSE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    MIN_KEYS_PER_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Multiply the probabilities by a slice of the values' columns.

    grid = (cdiv(D, BLOCK_D) * tiles_m * grid_splits * batch_heads,).
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    tiles_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tile_d = tl.program_id(0) % tiles_d
    pid = tl.program_id(0) // tiles_d
    start_m = pid % tiles_m * BLOCK_M
    split = pid // tiles_m % grid_splits
    batch_head = (pid // (tiles_m * grid_splits)).to(tl.int64)
    b = (first_batch_head + batch_head) // H
    start_q, len_q = sequence_of(cu_q_ptr, b, tokens, longest_q)
    start_k, len_k = sequence_of(cu_k_ptr, b, tokens_k, longest_k)
    h = (first_batch_head + batch_head) % H
    own_splits = count_splits(len_k, num_splits, max_splits, MIN_KEYS_PER_SPLIT) if IS_SPLIT else 1
    offs_d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    if (start_m == 0) & (split == 0):
        fill_rest(out_ptr, lse_ptr, cu_q_ptr, b, sequences, tokens, start_q + len_q, h, H, offs_d, D, HAS_LSE, BLOCK_M)
    if (start_m >= len_q) | (split >= own_splits):
        return
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_d = (offs_d < D)[None, :]

    first, last = split_bounds(split, own_splits, len_k, BLOCK_N)
    pitch = tiles_m * BLOCK_M
    stats = batch_head * tiles_n * pitch + start_m + offs_m  # [BLOCK_M]
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    for start_n in range(first, last, BLOCK_N):
        offs_stats = stats + start_n // BLOCK_N * pitch  # [BLOCK_M]
        m_tile = tl.load(m_ptr + offs_stats)  # [BLOCK_M]
        m_new = tl.maximum(m_i, m_tile)
        shift = finite_or_zero(m_new)
        l_i *= tl.exp2((m_i - shift) * LOG2E)
        l_i += tl.load(l_ptr + offs_stats) * tl.exp2((m_tile - shift) * LOG2E)
        m_i = m_new
    shift = finite_or_zero(m_i)

    columns = tiles_n * BLOCK_N
    p_ptr += (batch_head * pitch + start_m) * columns
    v_ptr += (start_k + first) * stride_v_t + h * stride_v_h
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_k in range(first, last, BLOCK_K):
        p = tl.load(p_ptr + start_k + (offs_m[:, None] * columns + offs_k[None, :]))  # [BLOCK_M, BLOCK_K]
        mask_k = (offs_k < last - start_k)[:, None]
        v_ptrs = v_ptr + (offs_k[:, None] * stride_v_t + offs_d[None, :])  # [BLOCK_K, BLOCK_D]
        v = tl.load(v_ptrs, mask=mask_k if D % BLOCK_D == 0 else mask_k & mask_d, other=0.0)
        m_tile = tl.load(m_ptr + stats + start_k // BLOCK_N * pitch)  # [BLOCK_M]
        alpha = tl.exp2((m_tile - shift) * LOG2E)  # [BLOCK_M]
        acc += dot(p, v, tl.zeros((BLOCK_M, BLOCK_D), tl.float32)) * alpha[:, None]
        v_ptr += BLOCK_K * stride_v_t

    mask_m = offs_m < len_q - start_m
    start_q += start_m
    row = h * tokens + start_q + offs_m  # [BLOCK_M]
    is_first = mask_m & (tile_d == 0)
    offs_out = start_q * H * D + h * D + (offs_m[:, None] * (H * D) + offs_d[None, :])  # [BLOCK_M, BLOCK_D]
    mask = mask_m[:, None] & mask_d
    if own_splits > 1:
        before = tl.cast(split, tl.int64) * H * tokens  # rows of the splits before
        tl.store(partial_m_ptr + before + row, m_i, mask=is_first)
        tl.store(partial_l_ptr + before + row, l_i, mask=is_first)
        tl.store(partial_ptr + before * D + offs_out, acc, mask=mask)
    else:
        l_i = tl.where(len_k == 0, 1.0, l_i)  # scores that are all -inf give 0 / 0
        if HAS_LSE:
            tl.store(lse_ptr + row, m_i + tl.log2(l_i) * LN2, mask=is_first)
        tl.store(out_ptr + offs_out, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def unfused_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, out, lse):
    """Fill ``out`` and, if it is not None, ``lse``."""
    q, k, v = row_contiguous(q, k, v)
    tokens, heads, head_dim = q.shape
    config = block_sizes("fwd", q)
    tiles_m, tiles_n = cdiv(max_seqlen_q, config["BLOCK_M"]), cdiv(max_seqlen_k, config["BLOCK_N"])
    rows, columns = tiles_m * config["BLOCK_M"], tiles_n * config["BLOCK_N"]
    chunks = workspace_chunks((cu_seqlens_q.numel() - 1) * heads, rows * columns * q.element_size())
    batch_heads = chunks[0][1]
    tiles_d = cdiv(head_dim, config["BLOCK_D"])
    heuristic = split_heuristic(q, config["BLOCK_M"], tiles_d)
    splits = heuristic.count(max_seqlen_k)

    p = q.new_empty(batch_heads, rows, columns)
    tile_m, tile_l = (torch.empty((batch_heads, tiles_n, rows), dtype=torch.float32, device=q.device) for _ in range(2))
    partial, partial_m, partial_l = partial_results(splits, out)
    sizes = {"tokens": tokens, "tiles_m": tiles_m, "tiles_n": tiles_n, "H": heads, "D": head_dim}
    packing = packing_arguments(k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    for first_batch_head, count in chunks:
        _cross_attention_scores_kernel[(tiles_m * tiles_n * count,)](
            q_ptr=q,
            k_ptr=k,
            p_ptr=p,
            m_ptr=tile_m,
            l_ptr=tile_l,
            **packing,
            **sizes,
            first_batch_head=first_batch_head,
            scale=softmax_scale,
            **strides_of(q=q, k=k),
            **launch_options(config, "BLOCK_M", "BLOCK_N", "BLOCK_C"),
            enable_fp_fusion=True,
        )
        _cross_attention_values_kernel[(tiles_d * tiles_m * splits * count,)](
            p_ptr=p,
            m_ptr=tile_m,
            l_ptr=tile_l,
            v_ptr=v,
            out_ptr=out,
            lse_ptr=lse,
            partial_ptr=partial,
            partial_m_ptr=partial_m,
            partial_l_ptr=partial_l,
            **packing,
            **sizes,
            first_batch_head=first_batch_head,
            sequences=cu_seqlens_q.numel() - 1,
            HAS_LSE=lse is not None,
            **heuristic.arguments(splits),
            **strides_of(v=v),
            **launch_options(config, "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_D"),
            enable_fp_fusion=True,
        )
    if splits > 1:
        combine(partial, (partial_m, partial_l), out, lse, packing, heuristic, natural=True)
