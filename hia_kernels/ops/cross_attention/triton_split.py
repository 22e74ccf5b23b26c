"""What the Triton kernels share: their packing, the device's size, and splits of the keys that are added up again."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LARGE_SHARED = 200 * 1024  # bytes a block may have: 227 KiB on Hopper and Blackwell, 163 or 99 KiB on others
MAX_SPLITS = 16
QUERIES = 256  # what a sequence is taken to have where its splits are chosen: those of an image in HiA
SHARE_BYTES = 4096  # a channel of a share's keys, at least: its partial result then moves 1/4 of what its keys do


@triton.jit
def sequence_of(cu_seqlens_ptr, b):
    """First packed row (int64: it is multiplied by strides) and length of sequence b."""
    start = tl.load(cu_seqlens_ptr + b)
    return start.to(tl.int64), tl.load(cu_seqlens_ptr + b + 1) - start


@triton.jit
def splits_of(length, once, most, LEAST: tl.constexpr):
    """Into how many shares a sequence of that many keys is cut: ``Splits.of`` on the device."""
    wanted = length // LEAST
    return tl.maximum(tl.where(wanted < most, tl.minimum(wanted, once), most), 1)


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


@triton.jit(do_not_specialize=["H", "tokens", "tiles_t", "once", "most"])
def _cross_attention_combine_kernel(
    partial_ptr,  # [splits, T, H, D] fp32
    top_ptr,  # [splits, H, T] fp32, only with HAS_STATS; IS_NATURAL or in powers of 2
    total_ptr,  # [splits, H, T] fp32, only with HAS_STATS
    out_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32, only with HAS_LSE
    cu_q_ptr,  # [B + 1], of the result's rows
    cu_k_ptr,  # [B + 1], of what was split
    tokens,
    tiles_t,
    H,
    once,
    most,  # tokens = T
    D: tl.constexpr,
    LEAST: tl.constexpr,
    HAS_STATS: tl.constexpr,
    IS_NATURAL: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds a sequence's partial results in their order, softmax weighted; grid = (tiles_t * B, H, cdiv(D, BLOCK_D)).

    A sequence in one share has none: its rows are written already.
    """
    LN2: tl.constexpr = 0.6931471805599453
    LOG2E: tl.constexpr = 1.4426950408889634
    start_t = tl.program_id(0) % tiles_t * BLOCK_T
    start_q, len_q = sequence_of(cu_q_ptr, tl.program_id(0) // tiles_t)
    _, len_k = sequence_of(cu_k_ptr, tl.program_id(0) // tiles_t)
    splits = splits_of(len_k, once, most, LEAST)
    if (start_t >= len_q) | (splits == 1):
        return
    h = tl.program_id(1).to(tl.int64)
    offs_t = start_q + start_t + tl.arange(0, BLOCK_T)  # int64: T * H * D may exceed 2**31
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < start_q + len_q
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


class Splits(NamedTuple):
    """How sequences are cut along the keys, each by its own length and nothing else of the batch.

    Attributes:
        once: splits that give each multiprocessor one program at most.
        most: splits of a sequence that is long enough for them; either ``once`` or 3, see :func:`split_rule`.
        least: keys of a share.
    """

    once: int
    most: int
    least: int

    def of(self, length):
        """Of a sequence of ``length`` keys; grows with it, so that of ``max_seqlen_k`` bounds all."""
        wanted = length // self.least
        return max(1, self.most if wanted >= self.most else min(wanted, self.once))

    def arguments(self, splits):
        """For a kernel whose grid and partial results are those of ``splits``: one compiled kernel for all batches."""
        return {
            "splits": splits,
            "once": self.once,
            "most": self.most,
            "LEAST": self.least,
            "IS_SPLIT": self.most > 1,
        }


def split_rule(q, block_m, slices=1):
    """Splits that fill the device from one sequence of ``QUERIES`` queries, whatever it is packed with.

    Args:
        q: [Tq, H, D].
        block_m: queries a program.
        slices: programs that share a block of queries.
    """
    programs = triton.cdiv(QUERIES, block_m) * q.shape[1] * slices
    places = _multiprocessors(q.device)
    once = max(1, min(MAX_SPLITS, places // programs))
    # two do not fit, three fill two rounds: 2/3 of the time of one. Two rounds of more would gain 1/5 at most.
    most = 3 if 2 * programs > places and 3 * programs <= 2 * places else once
    return Splits(once, most, SHARE_BYTES // q.element_size())


def partial_results(splits, out):
    """[splits, T, H, D] and twice [splits, H, T], fp32, for an ``out`` of [T, H, D]; empty for one split."""
    if splits == 1:
        return (torch.empty(0, dtype=torch.float32, device=out.device),) * 3
    tokens, heads = out.shape[:2]
    shapes = (tuple(out.shape), (heads, tokens), (heads, tokens))
    return tuple(torch.empty((splits, *shape), dtype=torch.float32, device=out.device) for shape in shapes)


def combine(partial, stats, out, lse, packing, rule, *, natural):
    """Fill the rows of ``out``, and of ``lse`` if there is one, that were not written for being in several shares.

    Args:
        partial: [splits, T, H, D] fp32.
        stats: their maxima and sums, [splits, H, T] each, or None: they are added as they are.
        out: [T, H, D].
        lse: [H, T], or None.
        packing: cu_seqlens of rows and of keys, and the longest sequence of rows.
        rule: of the splits.
        natural: the maxima are scores, not powers of 2.
    """
    tokens, heads, head_dim = out.shape
    top, total = (None, None) if stats is None else stats
    block_d = min(128, triton.next_power_of_2(head_dim))
    tiles_t = triton.cdiv(packing[2], 16)
    _cross_attention_combine_kernel[(tiles_t * (packing[0].numel() - 1), heads, triton.cdiv(head_dim, block_d))](
        partial,
        top,
        total,
        out,
        lse,
        *packing[:2],
        tokens=tokens,
        tiles_t=tiles_t,
        H=heads,
        once=rule.once,
        most=rule.most,
        D=head_dim,
        LEAST=rule.least,
        HAS_STATS=stats is not None,
        IS_NATURAL=natural,
        HAS_LSE=lse is not None,
        BLOCK_T=16,
        BLOCK_D=block_d,
    )


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


def is_carried(device):
    """Whether a loop over shared keys may carry their pointers: on AMD Triton 3.6 stops at buffer loads of such ones
    (triton-lang/triton#10701); elsewhere a row counted anew costs registers that the kernels don't have."""
    return family_of(device) != "amd"


def _multiprocessors(device):
    return 132 if device.type != "cuda" else _properties(_index(device))[1]


def _index(device):
    return torch.cuda.current_device() if device.index is None else device.index


def readable(*tensors):
    """Kernels read rows of contiguous channels, at 32-bit offsets within a block; whatever else is copied."""
    return [x if x.stride(-1) == 1 and x.stride(0) < 2**24 else x.contiguous() for x in tensors]


def strides_of(**tensors):
    """Keyword arguments ``stride_<name>_t`` and ``stride_<name>_h``."""
    return {f"stride_{name}_{dim}": x.stride(i) for name, x in tensors.items() for i, dim in enumerate("th")}


def tuning_key(mode, q):
    """What a measured configuration depends on: nothing of the batch, whose sequences would change bits together."""
    return f"{mode}-d{q.shape[2]}-{str(q.dtype).removeprefix('torch.')}"
