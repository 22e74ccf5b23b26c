"""Triton backward of ``cross_attention`` for wide heads and for fp32: p and ds by tiles, then three products.

p is recomputed from the saved log-sum-exp, as in FlashAttention's backward (Dao et al. 2022, section 3.1 and appendix
B.2), but stored, together with ds = p * (dp - delta).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...core.triton_math import dot
from ...core.tuning import cdiv
from .triton_split import (
    PACKING,
    SplitHeuristic,
    combine,
    count_splits,
    packing_arguments,
    partial_results,
    sequence_of,
    split_bounds,
    split_heuristic,
    strides_of,
)
from .triton_unfused import block_sizes, launch_options, rows_product, workspace_chunks

NO_SPLITS = SplitHeuristic(num_splits=1, max_splits=1, min_keys_per_split=1)


@triton.jit(do_not_specialize=["tokens", *PACKING, "tiles_m", "tiles_n", "first_batch_head"])
def _cross_attention_dscores_kernel(
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [Tk, H, D]
    v_ptr,  # [Tk, H, D]
    dout_ptr,  # [Tq, H, D]
    lse_delta_ptr,  # [H, 2, Tq] fp32: lse, delta
    cu_q_ptr,  # [B + 1]
    cu_k_ptr,  # [B + 1]
    p_ptr,  # [batch_heads, tiles_m * BLOCK_M, tiles_n * BLOCK_N]
    ds_ptr,  # [batch_heads, tiles_m * BLOCK_M, tiles_n * BLOCK_N]
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
    stride_v_t,
    stride_v_h,
    stride_dout_t,
    stride_dout_h,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store a tile of p and of ds = p * (dout v^T - delta), 0 beyond the ends.

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
    mask_m, mask_n = offs_m < len_q - start_m, offs_n < len_k - start_n
    start_q += start_m
    start_k += start_n

    scores = rows_product(
        q_ptr + start_q * stride_q_t + h * stride_q_h,
        k_ptr + start_k * stride_k_t + h * stride_k_h,
        mask_m,
        mask_n,
        stride_q_t,
        stride_k_t,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_C,
    )
    lse_delta_ptr += 2 * h * tokens + start_q
    lse = tl.load(lse_delta_ptr + offs_m, mask=mask_m, other=float("inf"))  # [BLOCK_M]; p = 0 beyond the queries
    p = tl.exp2((scores * scale - lse[:, None]) * LOG2E)  # [BLOCK_M, BLOCK_N]
    p = tl.where(mask_n[None, :], p, 0.0)
    columns = tiles_n * BLOCK_N
    offset = (batch_head * (tiles_m * BLOCK_M) + start_m) * columns + start_n
    offs_p = offs_m[:, None] * columns + offs_n[None, :]  # [BLOCK_M, BLOCK_N]
    p = p.to(p_ptr.dtype.element_ty)
    tl.store(p_ptr + offset + offs_p, p)

    dp = rows_product(
        dout_ptr + start_q * stride_dout_t + h * stride_dout_h,
        v_ptr + start_k * stride_v_t + h * stride_v_h,
        mask_m,
        mask_n,
        stride_dout_t,
        stride_v_t,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_C,
    )
    delta = tl.load(lse_delta_ptr + tokens + offs_m, mask=mask_m, other=0.0)  # [BLOCK_M]
    ds = p.to(tl.float32) * (dp - delta[:, None])
    tl.store(ds_ptr + offset + offs_p, ds.to(ds_ptr.dtype.element_ty))


@triton.jit(
    do_not_specialize=[
        "tokens",
        "tokens_x",
        "longest_y",
        "longest_x",
        "tiles_r",
        "tiles_m",
        "tiles_n",
        "grid_splits",
        "num_splits",
        "max_splits",
        "first_batch_head",
    ]
)
def _cross_attention_product_kernel(
    a_ptr,  # p or ds, [batch_heads, tiles_m * BLOCK_M, tiles_n * BLOCK_N]
    x_ptr,  # [Tx, H, D]: k for dq; with IS_TRANSPOSED q for dk, dout for dv
    cu_y_ptr,  # [B + 1], of the result's rows
    cu_x_ptr,  # [B + 1]
    y_ptr,  # [T, H, D]
    partial_ptr,  # [grid_splits, T, H, D] fp32, only with IS_SPLIT
    tokens,  # T
    tokens_x,
    longest_y,
    longest_x,
    tiles_r,
    tiles_m,
    tiles_n,
    grid_splits,  # of the longest sequence
    num_splits,
    max_splits,
    first_batch_head,
    H,
    scale,
    stride_x_t,
    stride_x_h,
    D: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    MIN_KEYS_PER_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute some columns of y = scale * a x, or of scale * a^T x with IS_TRANSPOSED.

    grid = (cdiv(D, BLOCK_D) * tiles_r * grid_splits * batch_heads,).
    """
    tiles_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tile_d = tl.program_id(0) % tiles_d
    pid = tl.program_id(0) // tiles_d
    start_r = pid % tiles_r * BLOCK_R
    split = pid // tiles_r % grid_splits
    batch_head = (pid // (tiles_r * grid_splits)).to(tl.int64)
    b = (first_batch_head + batch_head) // H
    start_y, len_y = sequence_of(cu_y_ptr, b, tokens, longest_y)
    start_x, len_x = sequence_of(cu_x_ptr, b, tokens_x, longest_x)
    h = (first_batch_head + batch_head) % H
    own_splits = count_splits(len_x, num_splits, max_splits, MIN_KEYS_PER_SPLIT) if IS_SPLIT else 1
    offs_d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    if (start_r >= len_y) | (split >= own_splits):
        return
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_d = (offs_d < D)[None, :]

    first, last = split_bounds(split, own_splits, len_x, BLOCK_K)
    columns = tiles_n * BLOCK_N
    a_ptr += batch_head * (tiles_m * BLOCK_M) * columns
    x_ptr += (start_x + first) * stride_x_t + h * stride_x_h
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_K):
        if IS_TRANSPOSED:
            a_ptrs = a_ptr + tl.cast(start, tl.int64) * columns + start_r
            a = tl.trans(tl.load(a_ptrs + (offs_k[:, None] * columns + offs_r[None, :])))  # [BLOCK_R, BLOCK_K]
        else:
            a_ptrs = a_ptr + tl.cast(start_r, tl.int64) * columns + start
            a = tl.load(a_ptrs + (offs_r[:, None] * columns + offs_k[None, :]))  # [BLOCK_R, BLOCK_K]
        mask_k = (offs_k < last - start)[:, None]
        x_ptrs = x_ptr + (offs_k[:, None] * stride_x_t + offs_d[None, :])  # [BLOCK_K, BLOCK_D]
        x = tl.load(x_ptrs, mask=mask_k if D % BLOCK_D == 0 else mask_k & mask_d, other=0.0)
        acc = dot(a, x, acc)
        x_ptr += BLOCK_K * stride_x_t

    start_y += start_r
    offs_y = start_y * H * D + h * D + (offs_r[:, None] * (H * D) + offs_d[None, :])  # [BLOCK_R, BLOCK_D]
    mask = (offs_r < len_y - start_r)[:, None] & mask_d
    if own_splits > 1:
        tl.store(partial_ptr + tl.cast(split, tl.int64) * tokens * H * D + offs_y, acc * scale, mask=mask)
    else:
        tl.store(y_ptr + offs_y, (acc * scale).to(y_ptr.dtype.element_ty), mask=mask)


def _rows_and_sums(packing, y, x):
    """Name the packing as a product does, whose rows are of ``y`` and whose sums go over ``x``: "q" and "k"."""
    names = {"cu_y_ptr": f"cu_{y}_ptr", "cu_x_ptr": f"cu_{x}_ptr", "longest_y": f"longest_{y}"}
    names |= {"longest_x": f"longest_{x}"}
    return {name: packing[source] for name, source in names.items()}


def unfused_bwd(q, k, v, dout, lse_delta, cu_seqlens_q, cu_seqlens_k, max_seqlens, softmax_scale, grads):
    """Fill ``grads``, those of q, k, v; ``lse_delta`` [H, 2, Tq] holds lse and delta."""
    dq, dk, dv = grads
    heads, head_dim = q.shape[1:]
    config = block_sizes("bwd", q)
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    tiles_m, tiles_n = cdiv(max_seqlens[0], block_m), cdiv(max_seqlens[1], block_n)
    shape = tiles_m * block_m, tiles_n * block_n
    chunks = workspace_chunks((cu_seqlens_q.numel() - 1) * heads, 2 * shape[0] * shape[1] * q.element_size())
    p, ds = (q.new_empty(chunks[0][1], *shape) for _ in range(2))  # the first chunk is the largest
    tiles_d = cdiv(head_dim, config["BLOCK_D"])
    heuristic = split_heuristic(q, block_m, tiles_d)
    splits = heuristic.count(max_seqlens[1])
    partial = partial_results(splits, dq)[0]
    sizes = {"tiles_m": tiles_m, "tiles_n": tiles_n, "H": heads, "D": head_dim}
    packing = packing_arguments(k, cu_seqlens_q, cu_seqlens_k, *max_seqlens)
    by_queries = {"IS_TRANSPOSED": False, "tiles_r": tiles_m, "BLOCK_R": block_m, **heuristic.arguments(splits)}
    by_queries |= _rows_and_sums(packing, "q", "k")
    by_keys = {"IS_TRANSPOSED": True, "tiles_r": tiles_n, "BLOCK_R": block_n, **NO_SPLITS.arguments(1)}
    by_keys |= _rows_and_sums(packing, "k", "q")
    for first_batch_head, count in chunks:
        sizes["first_batch_head"] = first_batch_head
        _cross_attention_dscores_kernel[(tiles_m * tiles_n * count,)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            dout_ptr=dout,
            lse_delta_ptr=lse_delta,
            **packing,
            p_ptr=p,
            ds_ptr=ds,
            **sizes,
            tokens=q.shape[0],
            scale=softmax_scale,
            **strides_of(q=q, k=k, v=v, dout=dout),
            **launch_options(config, "BLOCK_M", "BLOCK_N", "BLOCK_C"),
            enable_fp_fusion=True,
        )
        products = (
            (ds, k, dq, softmax_scale, by_queries),
            (ds, q, dk, softmax_scale, by_keys),
            (p, dout, dv, 1.0, by_keys),
        )
        for a, x, y, scale, layout in products:
            _cross_attention_product_kernel[(tiles_d * layout["tiles_r"] * layout["grid_splits"] * count,)](
                a_ptr=a,
                x_ptr=x,
                y_ptr=y,
                partial_ptr=partial,
                **sizes,
                **layout,
                tokens=y.shape[0],
                tokens_x=x.shape[0],
                scale=scale,
                **strides_of(x=x),
                **launch_options(config, "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_D"),
                enable_fp_fusion=True,
            )
    if splits > 1:
        combine(partial, None, dq, None, packing, heuristic, natural=True)
