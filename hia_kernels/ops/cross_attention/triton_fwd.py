"""Triton forward of ``cross_attention``: scores stay in registers, keys pass by in blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.triton_math import dot
from .triton_split import (
    combine,
    family_of,
    finite_or_zero,
    is_carried,
    load_rows,
    partial_results,
    readable,
    sequence_of,
    share_of,
    split_rule,
    splits_of,
    strides_of,
    tuning_key,
)
from .triton_unfused_fwd import unfused_fwd

LOG2E = 1.4426950408889634
# BLOCK_M, BLOCK_N, num_warps, num_stages by head_dim up to the first number: as large as the registers allow, and
# nothing that follows the batch: another order of sums would give a sequence other bits
BLOCKS = {
    "amd": {128: (128, 64, 8, 2), 256: (128, 32, 8, 1)},
    "ampere": {32: (128, 64, 8, 2), 128: (128, 64, 8, 3)},
    "hopper": {128: (128, 128, 8, 2), 256: (64, 64, 8, 2)},
    "blackwell": {128: (128, 128, 8, 2), 256: (64, 64, 8, 2)},
}


@triton.jit
def _attend(
    q,
    k_ptrs,
    v_ptrs,
    acc,
    top,
    total,  # [BLOCK_M, BLOCK_D], [BLOCK_N, BLOCK_D] x 2, sums, [BLOCK_M] x 2
    mask_n,
    offs_d,
    scale_log2e,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys: what was summed so far is rescaled to the new maximum."""
    k = load_rows(k_ptrs, mask_n, offs_d, D, BLOCK_D, MASKED)
    scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    seen = tl.where(mask_n[None, :], scores, float("-inf")) if MASKED else scores
    new_top = tl.maximum(top, tl.max(seen, axis=1) * scale_log2e)  # [BLOCK_M]
    shift = finite_or_zero(new_top)
    p = tl.exp2(scores * scale_log2e - shift[:, None])  # [BLOCK_M, BLOCK_N]
    if MASKED:
        p = tl.where(mask_n[None, :], p, 0.0)
    decay = tl.exp2(top - shift)  # [BLOCK_M]
    v = load_rows(v_ptrs, mask_n, offs_d, D, BLOCK_D, MASKED)
    acc = dot(p.to(v.dtype), v, acc * decay[:, None])
    return acc, new_top, total * decay + tl.sum(p, axis=1)


@triton.jit(do_not_specialize=["H", "tokens", "tiles_m", "splits", "once", "most"])
def _cross_attention_fwd_kernel(
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [Tk, H, D]
    v_ptr,  # [Tk, H, D]
    cu_q_ptr,  # [B + 1]
    cu_k_ptr,  # [B + 1]
    out_ptr,  # [Tq, H, D]
    lse_ptr,  # [H, Tq] fp32, only with HAS_LSE
    partial_ptr,  # [splits, Tq, H, D] fp32, not yet divided by the sum; these three only with IS_SPLIT
    top_ptr,  # [splits, H, Tq] fp32, maxima in powers of 2
    total_ptr,  # [splits, H, Tq] fp32
    tokens,
    tiles_m,
    splits,
    once,
    most,
    H,
    scale_log2e,  # tokens = Tq; splits of the longest sequence
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    stride_v_t,
    stride_v_h,
    D: tl.constexpr,
    HAS_LSE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    LEAST: tl.constexpr,
    IS_CARRIED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of one sequence's queries, one head, a share of the keys; grid = (tiles_m * splits * H * B,)."""
    LN2: tl.constexpr = 0.6931471805599453
    pid = tl.program_id(0)
    start_m = pid % tiles_m * BLOCK_M
    split = pid // tiles_m % splits
    h = (pid // (tiles_m * splits) % H).to(tl.int64)
    b = pid // (tiles_m * splits * H)
    start_q, len_q = sequence_of(cu_q_ptr, b)
    start_k, len_k = sequence_of(cu_k_ptr, b)
    own_splits = splits_of(len_k, once, most, LEAST) if IS_SPLIT else 1
    if (start_m >= len_q) | (split >= own_splits):
        return
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < len_q - start_m
    start_q += start_m

    q_ptr += start_q * stride_q_t + h * stride_q_h
    q = load_rows(q_ptr + (offs_m[:, None] * stride_q_t + offs_d[None, :]), mask_m, offs_d, D, BLOCK_D)
    first, last = share_of(split, own_splits, len_k, BLOCK_N)
    k_ptr += (start_k + first) * stride_k_t + h * stride_k_h
    v_ptr += (start_k + first) * stride_v_t + h * stride_v_h
    offs_k = offs_n[:, None] * stride_k_t + offs_d[None, :]  # [BLOCK_N, BLOCK_D]; int32, see rows_contiguous
    offs_v = offs_n[:, None] * stride_v_t + offs_d[None, :]  # [BLOCK_N, BLOCK_D]

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start_n in range(first, last - BLOCK_N + 1, BLOCK_N):
        passed = 0 if IS_CARRIED else tl.cast(start_n - first, tl.int64)
        acc, top, total = _attend(
            q,
            k_ptr + passed * stride_k_t + offs_k,
            v_ptr + passed * stride_v_t + offs_v,
            acc,
            top,
            total,
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
        acc, top, total = _attend(
            q,
            k_ptr + passed * stride_k_t + offs_k,
            v_ptr + passed * stride_v_t + offs_v,
            acc,
            top,
            total,
            offs_n < rest,
            offs_d,
            scale_log2e,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            MASKED=True,
        )

    row = h * tokens + start_q + offs_m  # [BLOCK_M]
    offs_out = start_q * H * D + h * D + (offs_m[:, None] * (H * D) + offs_d[None, :])  # [BLOCK_M, BLOCK_D]
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    if own_splits > 1:
        before = tl.cast(split, tl.int64) * H * tokens  # rows of the shares before
        tl.store(top_ptr + before + row, top, mask=mask_m)
        tl.store(total_ptr + before + row, total, mask=mask_m)
        tl.store(partial_ptr + before * D + offs_out, acc, mask=mask)
    else:
        total = tl.where(total == 0.0, 1.0, total)
        if HAS_LSE:
            tl.store(lse_ptr + row, (top + tl.log2(total)) * LN2, mask=mask_m)
        tl.store(out_ptr + offs_out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def is_fused(q):
    """Whether a block of the head fits beside its accumulators; products of fp32 operands take too many registers."""
    return q.element_size() == 2 and q.shape[2] <= max(BLOCKS[family_of(q.device)])


def blocks_of(table, q):
    """Of a table like ``BLOCKS``: the entry for this device and head_dim."""
    sizes = table[family_of(q.device)]
    return sizes[min(limit for limit in sizes if q.shape[2] <= limit)]


def _config(q):
    block_m, block_n, warps, stages = blocks_of(BLOCKS, q)
    heuristic = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    return tuning.pick("cross_attention", tuning_key("fwd", q), q.device, heuristic)


def _fused_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, out, lse):
    """Fill ``out`` and, if it is not None, ``lse``."""
    if softmax_scale < 0:  # the kernel takes a row's maximum before it scales
        q, softmax_scale = -q, -softmax_scale
    q, k, v = readable(q, k, v)
    tokens, heads, head_dim = q.shape
    config = _config(q)
    tiles_m = triton.cdiv(max_seqlen_q, config["BLOCK_M"])
    rule = split_rule(q, config["BLOCK_M"])
    splits = rule.of(max_seqlen_k)
    partial, *stats = partial_results(splits, out)
    _cross_attention_fwd_kernel[(tiles_m * splits * heads * (cu_seqlens_q.numel() - 1),)](
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        out,
        lse,
        partial,
        *stats,
        tokens=tokens,
        tiles_m=tiles_m,
        H=heads,
        scale_log2e=softmax_scale * LOG2E,
        **strides_of(q=q, k=k, v=v),
        **rule.arguments(splits),
        D=head_dim,
        HAS_LSE=lse is not None,
        IS_CARRIED=is_carried(q.device),
        BLOCK_D=max(16, tuning.bucket(head_dim)),
        **config,
    )
    if splits > 1:
        combine(partial, stats, out, lse, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q), rule, natural=False)


def _fill(out, lse, q, k, *rest):
    if out.numel() == 0:
        return
    if k.numel() == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
        return
    launch = _fused_fwd if is_fused(q) else unfused_fwd
    launch(*(q, k, *rest, out, lse))


def cross_attention_fwd(q, *rest):
    """[Tq, H, D], dtype of ``q``."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _fill(out, None, q, *rest)
    return out


def cross_attention_with_lse_fwd(q, *rest):
    """out [Tq, H, D], lse [H, Tq] fp32."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    _fill(out, lse, q, *rest)
    return out, lse
