"""What the Triton kernels share: their packing, the device's size, and splits of the keys that are added up again."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ...core import tuning

LARGE_SHARED = 200 * 1024  # bytes a block may have: 227 KiB on Hopper and Blackwell, 163 or 99 KiB on others
MAX_SPLITS = 16
SPLIT_STEPS = 4  # steps of the inner loop that writing and reading one partial result cost; so does the last launch


@triton.jit
def sequence_of(cu_seqlens_ptr, b):
    """First packed row (int64: it is multiplied by strides) and length of sequence b."""
    start = tl.load(cu_seqlens_ptr + b)
    return start.to(tl.int64), tl.load(cu_seqlens_ptr + b + 1) - start


@triton.jit
def share_of(split, splits, length, BLOCK: tl.constexpr):
    """The share of a sequence that a split works on: first row, end. Empty if there are fewer blocks than splits."""
    share = tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK
    first = split * share
    return first, tl.minimum(first + share, length)


@triton.jit
def load_rows(ptrs, mask, offs_d, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr = True):
    """[rows, BLOCK_D]; zero where ``mask`` [rows] is false (it is not looked at unless MASKED) and beyond D."""
    if MASKED:
        if D == BLOCK_D:
            return tl.load(ptrs, mask=mask[:, None], other=0.0)
        else:
            return tl.load(ptrs, mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def finite_or_zero(top):
    """A row whose scores are all -inf, or that has none, is shifted by 0: its sum is 0, not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit(do_not_specialize=["tokens", "splits"])
def _cross_attention_combine_kernel(
    partial_ptr,  # [splits, T, H, D] fp32
    top_ptr,  # [splits, H, T] fp32, only with HAS_STATS; IS_NATURAL or in powers of 2
    total_ptr,  # [splits, H, T] fp32, only with HAS_STATS
    out_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32, only with HAS_LSE
    tokens, splits, H,
    D: tl.constexpr, HAS_STATS: tl.constexpr, IS_NATURAL: tl.constexpr, HAS_LSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds partial results in their order, softmax weighted; grid = (cdiv(T, BLOCK_T), H, cdiv(D, BLOCK_D))."""
    LN2: tl.constexpr = 0.6931471805599453
    LOG2E: tl.constexpr = 1.4426950408889634
    h = tl.program_id(1).to(tl.int64)
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # int64: T * H * D may exceed 2**31
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < tokens
    mask = mask_t[:, None] & (offs_d < D)[None, :]
    offsets = (offs_t * H + h)[:, None] * D + offs_d[None, :]  # [BLOCK_T, BLOCK_D]
    stride_partial = tl.cast(tokens, tl.int64) * H * D
    stride_stats = tl.cast(tokens, tl.int64) * H

    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)  # [BLOCK_T]
    if HAS_STATS:
        for split in range(splits):
            one = tl.load(top_ptr + split * stride_stats + h * tokens + offs_t, mask=mask_t, other=float("-inf"))
            top = tl.maximum(top, one)
    shift = finite_or_zero(top)

    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)  # [BLOCK_T]
    for split in range(splits):
        partial = tl.load(partial_ptr + split * stride_partial + offsets, mask=mask, other=0.0)
        if HAS_STATS:
            at = split * stride_stats + h * tokens + offs_t
            below = tl.load(top_ptr + at, mask=mask_t, other=float("-inf")) - shift  # [BLOCK_T]
            weight = tl.exp2(below * LOG2E if IS_NATURAL else below)
            total += weight * tl.load(total_ptr + at, mask=mask_t, other=0.0)
            partial *= weight[:, None]
        acc += partial
    if HAS_STATS:
        total = tl.where(total == 0.0, 1.0, total)
        acc /= total[:, None]
        if HAS_LSE:
            mask_lse = mask_t & (tl.program_id(2) == 0)
            lse = top + tl.log2(total) * LN2 if IS_NATURAL else (top + tl.log2(total)) * LN2
            tl.store(lse_ptr + h * tokens + offs_t, lse, mask=mask_lse)
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


def combine(partial, stats, out, lse, *, natural):
    """Fill ``out``, and ``lse`` if there is one, from partial results.

    Args:
        partial: [splits, T, H, D] fp32.
        stats: their maxima and sums, [splits, H, T] each, or None: they are added as they are.
        out: [T, H, D].
        lse: [H, T], or None.
        natural: the maxima are scores, not powers of 2.
    """
    tokens, heads, head_dim = out.shape
    top, total = (None, None) if stats is None else stats
    block_d = min(128, triton.next_power_of_2(head_dim))
    _cross_attention_combine_kernel[(triton.cdiv(tokens, 16), heads, triton.cdiv(head_dim, block_d))](
        partial, top, total, out, lse, tokens=tokens, splits=partial.shape[0], H=heads, D=head_dim,
        HAS_STATS=stats is not None, IS_NATURAL=natural, HAS_LSE=lse is not None, BLOCK_T=16, BLOCK_D=block_d,
    )  # fmt: skip


@cache
def _properties(index):
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        family = "amd"
    elif getattr(properties, "shared_memory_per_block_optin", 0) < LARGE_SHARED:
        family = "ampere"
    else:
        family = "hopper" if properties.major < 10 else "blackwell"
    return family, properties.multi_processor_count


def family_of(device):
    """Whose block sizes fit: "amd", "ampere" (little shared memory, so consumer Ada and Blackwell too), "hopper",
    "blackwell". The interpreter plays a Hopper."""
    return "hopper" if device.type != "cuda" else _properties(_index(device))[0]


def _multiprocessors(device):
    return 132 if device.type != "cuda" else _properties(_index(device))[1]


def _index(device):
    return torch.cuda.current_device() if device.index is None else device.index


def split_count(programs, steps, device):
    """Into how many shares to cut the inner loop's ``steps`` so that ``programs`` of them fill the device.

    Counts rounds of programs, one to a multiprocessor, and what a split adds: the fewest steps in a row win.
    So the number follows how many sequences are packed: splits that one sequence alone needs would cost many together
    a partial result each. With equal splits packed sequences have the bits of one at a time, else they agree to
    rounding.
    """

    def cost(splits):
        added = SPLIT_STEPS if splits > 1 else 0
        rounds = triton.cdiv(programs * splits, _multiprocessors(device))
        return rounds * (triton.cdiv(steps, splits) + added) + added

    return min(range(1, max(1, min(MAX_SPLITS, steps)) + 1), key=cost)


def readable(*tensors):
    """Kernels read rows of contiguous channels, at 32-bit offsets within a block; whatever else is copied."""
    return [x if x.stride(-1) == 1 and x.stride(0) < 2**24 else x.contiguous() for x in tensors]


def strides_of(**tensors):
    """Keyword arguments ``stride_<name>_t`` and ``stride_<name>_h``."""
    return {f"stride_{name}_{dim}": x.stride(i) for name, x in tensors.items() for i, dim in enumerate("th")}


def tuning_key(mode, q, max_seqlen_q, max_seqlen_k):
    """Bucketed sizes, and what else a measured configuration depends on."""
    sizes = f"d{q.shape[2]}-q{tuning.bucket(max_seqlen_q)}-k{tuning.bucket(max_seqlen_k)}"
    return f"{mode}-{sizes}-{str(q.dtype).removeprefix('torch.')}"
