"""Parts that the Triton kernels of ``cross_attention`` share: packing, the device's size, split-KV and its combination.

Splitting the keys of few queries over many programs and combining the partial results by their log-sum-exp is
Flash-Decoding's scheme (Dao, Haziza, Massa and Sizov 2023); the rescaled sums are those of online softmax (Milakov and
Gimelshein 2018). Here partial results keep maximum and sum apart, and are divided once, after the combination.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.tuning import cdiv

LARGE_SHARED = 200 * 1024  # bytes of shared memory a block: Hopper and Blackwell have 227 KiB, others 163 or 99 KiB
MAX_SPLITS = 16
TYPICAL_QUERIES = 256  # queries assumed of a sequence when its splits are chosen: an image's in HiA
PACKING = ("tokens_k", "longest_q", "longest_k")  # numbers of packing_arguments, not specialized
MIN_SPLIT_BYTES = 4096  # of keys in a split, per channel: its partial result then moves 1/4 of what its keys do
SHORT_SPLIT_BYTES = 512  # the same where the device is at least 3/4 empty: waiting then costs more than moving


@triton.jit
def sequence_of(cu_seqlens_ptr, b, tokens, longest):
    """Return the first packed row (int64: it is multiplied by strides) and the length of sequence b.

    Nobody has checked the values on a GPU. Whatever they are, the rows are among ``tokens``, and at most ``longest``,
    which workspaces are allocated for.
    """
    start = tl.load(cu_seqlens_ptr + b, mask=b > 0, other=0)
    start = tl.minimum(tl.maximum(start, 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b + 1), start), tokens)
    return start.to(tl.int64), tl.minimum(end - start, longest)


@triton.jit
def fill_rest(
    y_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32, only with HAS_LSE
    cu_seqlens_ptr,  # [B + 1]
    b,
    sequences,  # B
    tokens,  # T
    first,
    h,
    H,
    offs_d,  # [BLOCK_D]
    D: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Fill the rows from ``first`` to the next sequence's, or to the last row, with zeros and lse with -inf.

    No sequence has them. Where lengths are right, there are none.
    """
    end = tl.where(b + 1 < sequences, tl.load(cu_seqlens_ptr + b + 1), tokens)
    end = tl.minimum(end, tokens).to(tl.int64)
    offs_t = tl.arange(0, BLOCK_T)
    for row in range(first, end, BLOCK_T):
        rows = row + offs_t
        offsets = (rows * H + h)[:, None] * D + offs_d[None, :]  # [BLOCK_T, BLOCK_D]
        mask = (rows < end)[:, None] & (offs_d < D)[None, :]
        tl.store(y_ptr + offsets, tl.zeros(offsets.shape, y_ptr.dtype.element_ty), mask=mask)
        if HAS_LSE:
            tl.store(lse_ptr + h * tokens + rows, tl.full((BLOCK_T,), float("-inf"), tl.float32), mask=rows < end)


@triton.jit
def count_splits(length, num_splits, max_splits, MIN_KEYS_PER_SPLIT: tl.constexpr):
    """Count the splits of a sequence of ``length`` keys: ``SplitHeuristic.count`` on the device."""
    wanted = length // MIN_KEYS_PER_SPLIT
    return tl.maximum(tl.where(wanted < max_splits, tl.minimum(wanted, num_splits), max_splits), 1)


@triton.jit
def split_bounds(split, splits, length, BLOCK: tl.constexpr):
    """Return the first key of a split and the end of its keys; empty if there are fewer blocks than splits."""
    keys_per_split = tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK
    first = split * keys_per_split
    return first, tl.minimum(first + keys_per_split, length)


@triton.jit
def load_rows(ptrs, mask, offs_d, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr = True):
    """Load [rows, BLOCK_D]: zeros where ``mask`` [rows] is false (ignored unless MASKED) and beyond D."""
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
def finite_or_zero(m_i):
    """Return the maximum that a row's scores are shifted by: 0 where all are -inf, whose sum is then 0, not NaN."""
    return tl.where(m_i == float("-inf"), 0.0, m_i)


@triton.jit(do_not_specialize=["H", "tokens", *PACKING, "tiles_t", "num_splits", "max_splits"])
def _cross_attention_combine_kernel(
    partial_ptr,  # [splits, T, H, D] fp32
    partial_m_ptr,  # [splits, H, T] fp32, only with HAS_STATS: maxima of scores, times log2(e) unless IS_NATURAL
    partial_l_ptr,  # [splits, H, T] fp32, only with HAS_STATS: sums of exponentials
    out_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32, only with HAS_LSE
    cu_q_ptr,  # [B + 1], of the result's rows
    cu_k_ptr,  # [B + 1], of what was split
    tokens,  # T
    tokens_k,
    longest_q,
    longest_k,
    tiles_t,
    H,
    num_splits,
    max_splits,
    D: tl.constexpr,
    MIN_KEYS_PER_SPLIT: tl.constexpr,
    HAS_STATS: tl.constexpr,
    IS_NATURAL: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Combine a sequence's partial results in their order, by log-sum-exp; grid = (tiles_t * B, H, cdiv(D, BLOCK_D)).

    A sequence in one split has none: its rows are already written.
    """
    LN2: tl.constexpr = 0.6931471805599453
    LOG2E: tl.constexpr = 1.4426950408889634
    start_t = tl.program_id(0) % tiles_t * BLOCK_T
    start_q, len_q = sequence_of(cu_q_ptr, tl.program_id(0) // tiles_t, tokens, longest_q)
    _, len_k = sequence_of(cu_k_ptr, tl.program_id(0) // tiles_t, tokens_k, longest_k)
    splits = count_splits(len_k, num_splits, max_splits, MIN_KEYS_PER_SPLIT)
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

    m_i = tl.full((BLOCK_T,), float("-inf"), tl.float32)  # [BLOCK_T]
    if HAS_STATS:
        for split in range(splits):
            m_split = tl.load(
                partial_m_ptr + split * stride_stats + h * tokens + offs_t, mask=mask_t, other=float("-inf")
            )
            m_i = tl.maximum(m_i, m_split)
    shift = finite_or_zero(m_i)

    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    l_i = tl.zeros((BLOCK_T,), tl.float32)  # [BLOCK_T]
    for split in range(splits):
        partial = tl.load(partial_ptr + split * stride_partial + offsets, mask=mask, other=0.0)
        if HAS_STATS:
            offs_stats = split * stride_stats + h * tokens + offs_t  # [BLOCK_T]
            exponent = tl.load(partial_m_ptr + offs_stats, mask=mask_t, other=float("-inf")) - shift  # [BLOCK_T]
            alpha = tl.exp2(exponent * LOG2E if IS_NATURAL else exponent)
            l_i += alpha * tl.load(partial_l_ptr + offs_stats, mask=mask_t, other=0.0)
            partial *= alpha[:, None]
        acc += partial
    if HAS_STATS:
        l_i = tl.where(mask_t, l_i, 1.0)  # there are keys: scores that are all -inf give 0 / 0
        acc /= l_i[:, None]
        if HAS_LSE:
            mask_lse = mask_t & (tl.program_id(2) == 0)
            lse = m_i + tl.log2(l_i) * LN2 if IS_NATURAL else (m_i + tl.log2(l_i)) * LN2
            tl.store(lse_ptr + h * tokens + offs_t, lse, mask=mask_lse)
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


class SplitHeuristic(NamedTuple):
    """Rule that cuts a sequence along its keys by its own length, and by nothing else of the batch.

    Attributes:
        num_splits: splits at which each multiprocessor has at most one program.
        max_splits: splits of a sequence that is long enough: ``num_splits``, or 3 (see :func:`split_heuristic`).
        min_keys_per_split: keys that a split has at least.
    """

    num_splits: int
    max_splits: int
    min_keys_per_split: int

    def count(self, length):
        """Count the splits of ``length`` keys. The count grows with the length: that of ``max_seqlen_k`` bounds all."""
        wanted = length // self.min_keys_per_split
        return max(1, self.max_splits if wanted >= self.max_splits else min(wanted, self.num_splits))

    def arguments(self, grid_splits):
        """Return the arguments of a kernel whose grid and partial results are those of ``grid_splits``.

        One compiled kernel serves all batches.
        """
        return {
            "grid_splits": grid_splits,
            "num_splits": self.num_splits,
            "max_splits": self.max_splits,
            "MIN_KEYS_PER_SPLIT": self.min_keys_per_split,
            "IS_SPLIT": self.max_splits > 1,
        }


def resident_programs(config):
    """Count the programs of a configuration that share a multiprocessor: two of four warps, one of eight."""
    return max(1, 8 // config["num_warps"])


def split_heuristic(q, block_m, slices=1, resident=1):
    """Return the splits that fill the device from one sequence of ``TYPICAL_QUERIES`` queries, however it is packed.

    Args:
        q: [Tq, H, D].
        block_m: queries a program.
        slices: programs that share a block of queries.
        resident: programs that run on a multiprocessor at once.
    """
    programs = -(-TYPICAL_QUERIES // block_m) * q.shape[1] * slices
    places = _multiprocessors(q.device) * resident
    num_splits = max(1, min(MAX_SPLITS, places // programs))
    # where two do not fit, three make two waves of programs: 2/3 of the time of one. Two waves of more splits would
    # gain 1/5 at most.
    fills_two_waves = 2 * programs > places and 3 * programs <= 2 * places
    max_splits = 3 if fills_two_waves else num_splits
    split_bytes = SHORT_SPLIT_BYTES if num_splits >= 4 else MIN_SPLIT_BYTES
    return SplitHeuristic(num_splits, max_splits, split_bytes // q.element_size())


def packing_arguments(k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """Return the arguments by which kernels find a sequence's rows, beside ``tokens``."""
    return {
        "cu_q_ptr": cu_seqlens_q,
        "cu_k_ptr": cu_seqlens_k,
        "tokens_k": k.shape[0],
        "longest_q": max_seqlen_q,
        "longest_k": max_seqlen_k,
    }


def partial_results(splits, out):
    """Allocate [splits, T, H, D] and twice [splits, H, T], fp32, for an ``out`` of [T, H, D]; empty for one split."""
    if splits == 1:
        return (torch.empty(0, dtype=torch.float32, device=out.device),) * 3
    tokens, heads = out.shape[:2]
    shapes = (tuple(out.shape), (heads, tokens), (heads, tokens))
    return tuple(torch.empty((splits, *shape), dtype=torch.float32, device=out.device) for shape in shapes)


def combine(partial, stats, out, lse, packing, heuristic, *, natural):
    """Fill the rows of ``out``, and of ``lse`` if there is one, whose sequence was cut into several splits.

    Args:
        partial: [splits, T, H, D] fp32.
        stats: maxima and sums of the partial results, [splits, H, T] each; None adds them unweighted.
        out: [T, H, D].
        lse: [H, T], or None.
        packing: as :func:`packing_arguments` returns it.
        heuristic: the splits'.
        natural: whether maxima are of scores, not of scores * log2(e).
    """
    tokens, heads, head_dim = out.shape
    partial_m, partial_l = (None, None) if stats is None else stats
    block_d = min(128, tuning.bucket(head_dim))
    tiles_t = cdiv(packing["longest_q"], 16)
    _cross_attention_combine_kernel[(tiles_t * (packing["cu_q_ptr"].numel() - 1), heads, cdiv(head_dim, block_d))](
        partial_ptr=partial,
        partial_m_ptr=partial_m,
        partial_l_ptr=partial_l,
        out_ptr=out,
        lse_ptr=lse,
        **packing,
        tokens=tokens,
        tiles_t=tiles_t,
        H=heads,
        num_splits=heuristic.num_splits,
        max_splits=heuristic.max_splits,
        D=head_dim,
        MIN_KEYS_PER_SPLIT=heuristic.min_keys_per_split,
        HAS_STATS=stats is not None,
        IS_NATURAL=natural,
        HAS_LSE=lse is not None,
        BLOCK_T=16,
        BLOCK_D=block_d,
        enable_fp_fusion=True,
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
    """Name the family whose block sizes fit a device: "amd", "ampere", "hopper" or "blackwell".

    "ampere" has little shared memory: consumer Ada and Blackwell count as it. The interpreter counts as "hopper".
    """
    return "hopper" if device.type != "cuda" else _properties(_index(device))[0]


def is_carried(device):
    """Say whether the loop over a split's keys carries its pointers, in place of computing them from the row.

    On AMD, Triton 3.6 fails at buffer loads through loop-carried pointers (triton-lang/triton#10701); elsewhere
    computing them costs registers that the kernels do not have.
    """
    return family_of(device) != "amd"


def _multiprocessors(device):
    return 132 if device.type != "cuda" else _properties(_index(device))[1]


def _index(device):
    return torch.cuda.current_device() if device.index is None else device.index


def row_contiguous(*tensors):
    """Return the tensors as kernels read them: contiguous channels, 32-bit offsets in a block; others are copied."""
    return [x if x.stride(-1) == 1 and x.stride(0) < 2**24 else x.contiguous() for x in tensors]


def strides_of(**tensors):
    """Return the keyword arguments ``stride_<name>_t`` and ``stride_<name>_h``."""
    return {f"stride_{name}_{dim}": x.stride(i) for name, x in tensors.items() for i, dim in enumerate("th")}


def tuning_key(mode, q):
    """Name what a tuned configuration depends on: nothing of the batch, or packing would change a sequence's bits."""
    return f"{mode}-d{q.shape[2]}-{str(q.dtype).removeprefix('torch.')}"
