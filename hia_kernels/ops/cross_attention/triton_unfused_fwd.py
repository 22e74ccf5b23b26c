"""Triton forward of ``cross_attention`` for wide heads and for fp32: scores, then values, in two kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.triton_math import dot
from .triton_split import (
    combine,
    finite_or_zero,
    partial_results,
    readable,
    sequence_of,
    share_of,
    split_rule,
    splits_of,
    strides_of,
)
from .triton_unfused import block_sizes, chosen, chunks_of, rows_product


@triton.jit(do_not_specialize=["tiles_m", "tiles_n", "first_pair"])
def _cross_attention_scores_kernel(
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [Tk, H, D]
    cu_q_ptr,  # [B + 1]
    cu_k_ptr,  # [B + 1]
    p_ptr,  # [pairs, tiles_m * BLOCK_M, tiles_n * BLOCK_N]; a pair is a sequence and a head
    top_ptr,  # [pairs, tiles_n, tiles_m * BLOCK_M] fp32
    total_ptr,  # [pairs, tiles_n, tiles_m * BLOCK_M] fp32
    tiles_m,
    tiles_n,
    first_pair,
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
    """A tile of exp(scores) relative to its rows' maxima, 0 beyond the keys; grid = (tiles_m * tiles_n * pairs,)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    tile_m = tl.program_id(0) % tiles_m
    tile_n = tl.program_id(0) // tiles_m % tiles_n
    pair = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    start_q, len_q = sequence_of(cu_q_ptr, (first_pair + pair) // H)
    start_k, len_k = sequence_of(cu_k_ptr, (first_pair + pair) // H)
    h = (first_pair + pair) % H
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
    top = tl.max(scores, axis=1)  # [BLOCK_M]
    p = tl.exp2((scores - finite_or_zero(top)[:, None]) * LOG2E)  # [BLOCK_M, BLOCK_N]

    stats = (pair * tiles_n + tile_n) * (tiles_m * BLOCK_M) + start_m + offs_m  # [BLOCK_M]
    tl.store(top_ptr + stats, top)
    tl.store(total_ptr + stats, tl.sum(p, axis=1))
    columns = tiles_n * BLOCK_N
    p_ptr += (pair * (tiles_m * BLOCK_M) + start_m) * columns + start_n
    tl.store(p_ptr + (offs_m[:, None] * columns + offs_n[None, :]), p.to(p_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["tokens", "tiles_m", "tiles_n", "splits", "once", "most", "first_pair"])
def _cross_attention_values_kernel(
    p_ptr,  # [pairs, tiles_m * BLOCK_M, tiles_n * BLOCK_N]
    top_ptr,  # [pairs, tiles_n, tiles_m * BLOCK_M] fp32
    total_ptr,  # [pairs, tiles_n, tiles_m * BLOCK_M] fp32
    v_ptr,  # [Tk, H, D]
    cu_q_ptr,  # [B + 1]
    cu_k_ptr,  # [B + 1]
    out_ptr,  # [Tq, H, D]
    lse_ptr,  # [H, Tq] fp32, only with HAS_LSE
    partial_ptr,  # [splits, Tq, H, D] fp32, not yet divided by the sum; these three only with IS_SPLIT
    share_top_ptr,  # [splits, H, Tq] fp32, maxima
    share_total_ptr,  # [splits, H, Tq] fp32
    tokens,
    tiles_m,
    tiles_n,
    splits,
    once,
    most,
    first_pair,
    H,
    stride_v_t,
    stride_v_h,
    D: tl.constexpr,
    HAS_LSE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Probabilities times a slice of the values' columns; grid = (cdiv(D, BLOCK_D) * tiles_m * splits * pairs,)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    tiles_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tile_d = tl.program_id(0) % tiles_d
    pid = tl.program_id(0) // tiles_d
    start_m = pid % tiles_m * BLOCK_M
    split = pid // tiles_m % splits
    pair = (pid // (tiles_m * splits)).to(tl.int64)
    start_q, len_q = sequence_of(cu_q_ptr, (first_pair + pair) // H)
    start_k, len_k = sequence_of(cu_k_ptr, (first_pair + pair) // H)
    h = (first_pair + pair) % H
    own_splits = splits_of(len_k, once, most, LEAST) if IS_SPLIT else 1
    if (start_m >= len_q) | (split >= own_splits):
        return
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]

    first, last = share_of(split, own_splits, len_k, BLOCK_N)
    pitch = tiles_m * BLOCK_M
    stats = pair * tiles_n * pitch + start_m + offs_m  # [BLOCK_M]
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start_n in range(first, last, BLOCK_N):
        at = stats + start_n // BLOCK_N * pitch  # [BLOCK_M]
        tile_top = tl.load(top_ptr + at)  # [BLOCK_M]
        new_top = tl.maximum(top, tile_top)
        shift = finite_or_zero(new_top)
        total *= tl.exp2((top - shift) * LOG2E)
        total += tl.load(total_ptr + at) * tl.exp2((tile_top - shift) * LOG2E)
        top = new_top
    shift = finite_or_zero(top)

    columns = tiles_n * BLOCK_N
    p_ptr += (pair * pitch + start_m) * columns
    v_ptr += (start_k + first) * stride_v_t + h * stride_v_h
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_k in range(first, last, BLOCK_K):
        p = tl.load(p_ptr + start_k + (offs_m[:, None] * columns + offs_k[None, :]))  # [BLOCK_M, BLOCK_K]
        mask_k = (offs_k < last - start_k)[:, None]
        v_ptrs = v_ptr + (offs_k[:, None] * stride_v_t + offs_d[None, :])  # [BLOCK_K, BLOCK_D]
        v = tl.load(v_ptrs, mask=mask_k if D % BLOCK_D == 0 else mask_k & mask_d, other=0.0)
        tile_top = tl.load(top_ptr + stats + start_k // BLOCK_N * pitch)  # [BLOCK_M]
        weight = tl.exp2((tile_top - shift) * LOG2E)  # [BLOCK_M]
        acc += dot(p, v, tl.zeros((BLOCK_M, BLOCK_D), tl.float32)) * weight[:, None]
        v_ptr += BLOCK_K * stride_v_t

    mask_m = offs_m < len_q - start_m
    start_q += start_m
    row = h * tokens + start_q + offs_m  # [BLOCK_M]
    is_first = mask_m & (tile_d == 0)
    offs_out = start_q * H * D + h * D + (offs_m[:, None] * (H * D) + offs_d[None, :])  # [BLOCK_M, BLOCK_D]
    mask = mask_m[:, None] & mask_d
    if own_splits > 1:
        before = tl.cast(split, tl.int64) * H * tokens  # rows of the shares before
        tl.store(share_top_ptr + before + row, top, mask=is_first)
        tl.store(share_total_ptr + before + row, total, mask=is_first)
        tl.store(partial_ptr + before * D + offs_out, acc, mask=mask)
    else:
        total = tl.where(total == 0.0, 1.0, total)
        if HAS_LSE:
            tl.store(lse_ptr + row, top + tl.log2(total) * LN2, mask=is_first)
        tl.store(out_ptr + offs_out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def unfused_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, out, lse):
    """Fill ``out`` and, if it is not None, ``lse``."""
    q, k, v = readable(q, k, v)
    tokens, heads, head_dim = q.shape
    config = block_sizes("fwd", q)
    tiles_m, tiles_n = triton.cdiv(max_seqlen_q, config["BLOCK_M"]), triton.cdiv(max_seqlen_k, config["BLOCK_N"])
    rows, columns = tiles_m * config["BLOCK_M"], tiles_n * config["BLOCK_N"]
    chunks = chunks_of((cu_seqlens_q.numel() - 1) * heads, rows * columns * q.element_size())
    pairs = chunks[0][1]
    tiles_d = triton.cdiv(head_dim, config["BLOCK_D"])
    rule = split_rule(q, config["BLOCK_M"], tiles_d)
    splits = rule.of(max_seqlen_k)

    p = q.new_empty(pairs, rows, columns)
    of_tiles = [torch.empty((pairs, tiles_n, rows), dtype=torch.float32, device=q.device) for _ in range(2)]
    partial, *of_shares = partial_results(splits, out)
    cu_seqlens = (cu_seqlens_q, cu_seqlens_k)
    sizes = {"tiles_m": tiles_m, "tiles_n": tiles_n, "H": heads, "D": head_dim}
    for first_pair, count in chunks:
        _cross_attention_scores_kernel[(tiles_m * tiles_n * count,)](
            q,
            k,
            *cu_seqlens,
            p,
            *of_tiles,
            **sizes,
            first_pair=first_pair,
            scale=softmax_scale,
            **strides_of(q=q, k=k),
            **chosen(config, "BLOCK_M", "BLOCK_N", "BLOCK_C"),
        )
        _cross_attention_values_kernel[(tiles_d * tiles_m * splits * count,)](
            p,
            *of_tiles,
            v,
            *cu_seqlens,
            out,
            lse,
            partial,
            *of_shares,
            **sizes,
            first_pair=first_pair,
            tokens=tokens,
            HAS_LSE=lse is not None,
            **rule.arguments(splits),
            **strides_of(v=v),
            **chosen(config, "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_D"),
        )
    if splits > 1:
        combine(partial, of_shares, out, lse, (*cu_seqlens, max_seqlen_q), rule, natural=True)
