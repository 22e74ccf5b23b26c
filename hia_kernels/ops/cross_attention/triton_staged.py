"""``cross_attention`` for wide heads and for fp32: probabilities pass through memory between two plain products.

A block of head_dim 640 has accumulators and operands beyond a multiprocessor's registers and shared memory, and
scores computed again for every slice of columns would multiply the work. Few queries make the probabilities
smaller than the keys: they are written once, for a few heads at a time, and read where they are needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.triton_math import dot
from .triton_split import (
    Splits,
    combine,
    family_of,
    finite_or_zero,
    partial_results,
    readable,
    sequence_of,
    share_of,
    split_rule,
    splits_of,
    strides_of,
    tuning_key,
)

NO_SPLITS = Splits(once=1, most=1, least=1)
WORKSPACE = 64 * 2**20  # bytes of probabilities held at once, about an H100's L2; one head's are held in any case


@triton.jit
def _rows_product(
    a_ptr,
    b_ptr,
    mask_a,
    mask_b,
    stride_a,
    stride_b,  # first row of each, [BLOCK_A], [BLOCK_B]
    D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """a b^T, [BLOCK_A, BLOCK_B] fp32, from rows of D channels, BLOCK_C at a time."""
    offs_c = tl.arange(0, BLOCK_C)
    a_ptrs = a_ptr + (tl.arange(0, BLOCK_A)[:, None] * stride_a + offs_c[None, :])  # [BLOCK_A, BLOCK_C]
    b_ptrs = b_ptr + (tl.arange(0, BLOCK_B)[:, None] * stride_b + offs_c[None, :])  # [BLOCK_B, BLOCK_C]
    acc = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for c in range(0, D, BLOCK_C):
        if D % BLOCK_C == 0:
            a = tl.load(a_ptrs + c, mask=mask_a[:, None], other=0.0)
            b = tl.load(b_ptrs + c, mask=mask_b[:, None], other=0.0)
        else:
            mask_c = (c + offs_c < D)[None, :]
            a = tl.load(a_ptrs + c, mask=mask_a[:, None] & mask_c, other=0.0)
            b = tl.load(b_ptrs + c, mask=mask_b[:, None] & mask_c, other=0.0)
        acc = dot(a, tl.trans(b), acc)
    return acc


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

    scores = _rows_product(
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


@triton.jit(do_not_specialize=["tokens", "tiles_m", "tiles_n", "first_pair"])
def _cross_attention_dscores_kernel(
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [Tk, H, D]
    v_ptr,  # [Tk, H, D]
    dout_ptr,  # [Tq, H, D]
    rows_ptr,  # [H, 2, Tq] fp32: lse, delta
    cu_q_ptr,  # [B + 1]
    cu_k_ptr,  # [B + 1]
    p_ptr,  # [pairs, tiles_m * BLOCK_M, tiles_n * BLOCK_N]
    ds_ptr,  # likewise
    tokens,
    tiles_m,
    tiles_n,
    first_pair,
    H,
    scale,  # tokens = Tq
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
    """A tile of p and of ds = p * (dout v^T - delta), 0 beyond the ends; grid = (tiles_m * tiles_n * pairs,)."""
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
    mask_m, mask_n = offs_m < len_q - start_m, offs_n < len_k - start_n
    start_q += start_m
    start_k += start_n

    scores = _rows_product(
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
    rows_ptr += 2 * h * tokens + start_q
    lse = tl.load(rows_ptr + offs_m, mask=mask_m, other=float("inf"))  # [BLOCK_M]; p = 0 beyond the queries
    p = tl.exp2((scores * scale - lse[:, None]) * LOG2E)  # [BLOCK_M, BLOCK_N]
    p = tl.where(mask_n[None, :], p, 0.0)
    columns = tiles_n * BLOCK_N
    offset = (pair * (tiles_m * BLOCK_M) + start_m) * columns + start_n
    offs_p = offs_m[:, None] * columns + offs_n[None, :]  # [BLOCK_M, BLOCK_N]
    p = p.to(p_ptr.dtype.element_ty)
    tl.store(p_ptr + offset + offs_p, p)

    dp = _rows_product(
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
    delta = tl.load(rows_ptr + tokens + offs_m, mask=mask_m, other=0.0)  # [BLOCK_M]
    ds = p.to(tl.float32) * (dp - delta[:, None])
    tl.store(ds_ptr + offset + offs_p, ds.to(ds_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["tokens", "tiles_r", "tiles_m", "tiles_n", "splits", "once", "most", "first_pair"])
def _cross_attention_product_kernel(
    a_ptr,  # p or ds, [pairs, tiles_m * BLOCK_M, tiles_n * BLOCK_N]
    x_ptr,  # [Tx, H, D]: k for dq; with IS_TRANSPOSED q for dk, dout for dv
    cu_y_ptr,  # [B + 1], of the result's rows
    cu_x_ptr,  # [B + 1]
    y_ptr,  # [T, H, D]
    partial_ptr,  # [splits, T, H, D] fp32, only with IS_SPLIT
    tokens,
    tiles_r,
    tiles_m,
    tiles_n,
    splits,
    once,
    most,
    first_pair,
    H,
    scale,
    stride_x_t,
    stride_x_h,  # tokens = T
    D: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = scale * a x or scale * a^T x, some columns; grid = (cdiv(D, BLOCK_D) * tiles_r * splits * pairs,)."""
    tiles_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tile_d = tl.program_id(0) % tiles_d
    pid = tl.program_id(0) // tiles_d
    start_r = pid % tiles_r * BLOCK_R
    split = pid // tiles_r % splits
    pair = (pid // (tiles_r * splits)).to(tl.int64)
    start_y, len_y = sequence_of(cu_y_ptr, (first_pair + pair) // H)
    start_x, len_x = sequence_of(cu_x_ptr, (first_pair + pair) // H)
    h = (first_pair + pair) % H
    own_splits = splits_of(len_x, once, most, LEAST) if IS_SPLIT else 1
    if (start_r >= len_y) | (split >= own_splits):
        return
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]

    first, last = share_of(split, own_splits, len_x, BLOCK_K)
    columns = tiles_n * BLOCK_N
    a_ptr += pair * (tiles_m * BLOCK_M) * columns
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


def _blocks(mode, q):
    """Tiles of the products: fp32 has no matrix instructions, so smaller ones and a short inner dimension.

    Nothing that follows the batch: another order of sums would give a sequence other bits.
    """
    block_d = max(16, tuning.bucket(q.shape[2]))
    if q.element_size() == 4:
        heuristic = {
            "BLOCK_M": 64,
            "BLOCK_N": 64,
            "BLOCK_C": 16,
            "BLOCK_K": 16,
            "BLOCK_D": min(64, block_d),
            "num_warps": 4,
            "num_stages": 3,
        }
    else:
        large = family_of(q.device) in ("hopper", "blackwell")
        heuristic = {
            "BLOCK_M": 128,
            "BLOCK_N": 128,
            "BLOCK_C": 64,
            "BLOCK_K": 128 if large and mode == "fwd" else 64,
            "BLOCK_D": min(128, block_d),
            "num_warps": 8,
            "num_stages": 3 if large else 2,
        }
    return tuning.pick("cross_attention", tuning_key(f"{mode}-staged", q), q.device, heuristic)


def _chosen(config, *names):
    return {name: config[name] for name in (*names, "num_warps", "num_stages")}


def _chunks(pairs, pair_bytes):
    """First and number of pairs, a workspace at a time, as even as they come."""
    chunks = max(1, min(pairs, triton.cdiv(pairs * pair_bytes, WORKSPACE)))
    share = triton.cdiv(pairs, chunks)
    return [(first, min(share, pairs - first)) for first in range(0, pairs, share)]


def staged_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, out, lse):
    """Fill ``out`` and, if it is not None, ``lse``."""
    q, k, v = readable(q, k, v)
    tokens, heads, head_dim = q.shape
    config = _blocks("fwd", q)
    tiles_m, tiles_n = triton.cdiv(max_seqlen_q, config["BLOCK_M"]), triton.cdiv(max_seqlen_k, config["BLOCK_N"])
    rows, columns = tiles_m * config["BLOCK_M"], tiles_n * config["BLOCK_N"]
    chunks = _chunks((cu_seqlens_q.numel() - 1) * heads, rows * columns * q.element_size())
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
            **_chosen(config, "BLOCK_M", "BLOCK_N", "BLOCK_C"),
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
            **_chosen(config, "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_D"),
        )
    if splits > 1:
        combine(partial, of_shares, out, lse, (*cu_seqlens, max_seqlen_q), rule, natural=True)


def staged_bwd(q, k, v, dout, rows_stats, cu_seqlens_q, cu_seqlens_k, max_seqlens, softmax_scale, grads):
    """Fill ``grads``, those of q, k, v; ``rows_stats`` [H, 2, Tq]: lse, delta."""
    dq, dk, dv = grads
    heads, head_dim = q.shape[1:]
    config = _blocks("bwd", q)
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    tiles_m, tiles_n = triton.cdiv(max_seqlens[0], block_m), triton.cdiv(max_seqlens[1], block_n)
    shape = tiles_m * block_m, tiles_n * block_n
    chunks = _chunks((cu_seqlens_q.numel() - 1) * heads, 2 * shape[0] * shape[1] * q.element_size())
    pairs = chunks[0][1]
    p, ds = q.new_empty(pairs, *shape), q.new_empty(pairs, *shape)
    tiles_d = triton.cdiv(head_dim, config["BLOCK_D"])
    rule = split_rule(q, block_m, tiles_d)
    splits = rule.of(max_seqlens[1])
    partial = partial_results(splits, dq)[0]
    sizes = {"tiles_m": tiles_m, "tiles_n": tiles_n, "H": heads, "D": head_dim}
    for first_pair, count in chunks:
        sizes["first_pair"] = first_pair
        _cross_attention_dscores_kernel[(tiles_m * tiles_n * count,)](
            q,
            k,
            v,
            dout,
            rows_stats,
            cu_seqlens_q,
            cu_seqlens_k,
            p,
            ds,
            **sizes,
            tokens=q.shape[0],
            scale=softmax_scale,
            **strides_of(q=q, k=k, v=v, dout=dout),
            **_chosen(config, "BLOCK_M", "BLOCK_N", "BLOCK_C"),
        )
        by_queries = {"IS_TRANSPOSED": False, "tiles_r": tiles_m, "BLOCK_R": block_m, **rule.arguments(splits)}
        by_keys = {"IS_TRANSPOSED": True, "tiles_r": tiles_n, "BLOCK_R": block_n, **NO_SPLITS.arguments(1)}
        products = (
            (ds, k, cu_seqlens_q, cu_seqlens_k, dq, softmax_scale, by_queries),
            (ds, q, cu_seqlens_k, cu_seqlens_q, dk, softmax_scale, by_keys),
            (p, dout, cu_seqlens_k, cu_seqlens_q, dv, 1.0, by_keys),
        )
        for a, x, cu_seqlens_y, cu_seqlens_x, y, scale, by in products:
            _cross_attention_product_kernel[(tiles_d * by["tiles_r"] * by["splits"] * count,)](
                a,
                x,
                cu_seqlens_y,
                cu_seqlens_x,
                y,
                partial,
                **sizes,
                **by,
                tokens=y.shape[0],
                scale=scale,
                **strides_of(x=x),
                **_chosen(config, "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_D"),
            )
    if splits > 1:
        combine(partial, None, dq, None, (cu_seqlens_q, cu_seqlens_k, max_seqlens[0]), rule, natural=True)
