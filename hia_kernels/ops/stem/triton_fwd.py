"""Triton forward of ``stem``: raw pixels to pooled features; at full resolution, only normalised pixels are written.

The convolution is an implicit GEMM over its taps (Chetlur et al. 2014, section 3) on pixels that
:func:`.triton_pack.padded` has laid out: with its padding there, no load has a mask, and with its rows in pairs, a
window's taps are few contiguous segments, aligned to 16 bytes for even columns and 8 for odd ones (16-bit dtypes).
"""

from __future__ import annotations

from math import isqrt

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.triton_math import dot
from ...core.tuning import cdiv
from .triton_pack import half, pack_taps, padded, rounded, tap_of, window_cut

MULTIPROCESSORS = 132  # of an H100 or H200
CANDIDATES = {  # by how a key begins; the other kernels' are their neighbours
    "fwd": [
        {"num_warps": 8},
        {"num_stages": 3},
        {"num_stages": 1},
        {"BLOCK_R": 8, "num_warps": 8},
        {"BLOCK_R": 2, "BLOCK_Q": 32},
        {"ROWS": 1},
        {"ROWS": 4},
    ]
}


@triton.jit
def _taps(packed_ptr, row, offs_oc, OC, BLOCK_K: tl.constexpr):
    """Load BLOCK_K slots of packed weights, [BLOCK_K, BLOCK_OC]."""
    w_ptrs = packed_ptr + (row + tl.arange(0, BLOCK_K))[:, None] * OC + offs_oc[None, :]
    return tl.load(w_ptrs, mask=(offs_oc < OC)[None, :], other=0.0)


@triton.jit
def _convolved(
    x_ptr,
    first,
    w,
    packed_ptr,
    offs_oc,
    OC,
    stride_x_c,
    stride_x_r,
    PIXELS: tl.constexpr,
    CP: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Convolve where windows begin at ``first`` [BLOCK_M] after ``x_ptr``, [BLOCK_M, BLOCK_OC] fp32.

    ``w`` are the weights where one slice holds them all.
    """
    SEGMENT: tl.constexpr = 2 * KERNEL + 2  # a window's part of a pair of rows
    STEPS: tl.constexpr = CP * TAPS // BLOCK_K
    conv = tl.zeros((BLOCK_M, BLOCK_OC), dtype=tl.float32)
    for step in range(STEPS):
        slots = step * BLOCK_K % TAPS + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        plane_ptr = x_ptr
        if CP == 3:
            plane_ptr += tl.cast(stride_x_c, tl.int64) * (step * BLOCK_K // TAPS)
        offsets = slots // SEGMENT * stride_x_r + slots % SEGMENT  # [BLOCK_K]
        x = tl.load(plane_ptr + (first[:, None] + offsets[None, :]))  # [BLOCK_M, BLOCK_K]
        if PIXELS == "float":  # a NaN in a free slot would survive its zero weight
            ky, kx = tap_of(slots, KERNEL)
            x = tl.where(((ky < KERNEL) & (kx < KERNEL))[None, :], x, 0.0)
        if STEPS > 1:
            plane = 3 * TAPS if CP == 1 else 0  # a grey image's weights are the fourth plane
            w = _taps(packed_ptr, plane + step * BLOCK_K, offs_oc, OC, BLOCK_K)
        conv = dot(x, w, conv)
    return conv


@triton.jit
def _total(packed_ptr, offs_oc, OC, TAPS: tl.constexpr):
    """Return what a grey image's channels add to a whole window beside the product, [1, BLOCK_OC]."""
    ptrs, mask = packed_ptr + 4 * TAPS * OC + offs_oc, offs_oc < OC
    total = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return (total + tl.load(ptrs + (TAPS - 1) * OC, mask=mask, other=0.0).to(tl.float32))[None, :]


@triton.jit
def _missing(packed_ptr, cut, offs_oc, OC, TAPS: tl.constexpr):
    """Return what windows cut as ``cut`` [BLOCK] says add on top of that, [BLOCK, BLOCK_OC]; whole ones zero."""
    ptrs = packed_ptr + (4 * TAPS + cut)[:, None] * OC + offs_oc[None, :]
    return tl.load(ptrs, mask=(cut > 0)[:, None] & (offs_oc < OC)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _best(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _with_column(
    best,
    column,
    y,
    q,
    at_edge,
    corner_ptr,
    first_y,
    w,
    packed_ptr,
    offs_oc,
    IH,
    IW,
    OW,
    OC,
    stride_x_c,
    stride_x_r,
    PIXELS: tl.constexpr,
    CP: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the maximum of ``best`` and the convolution in row y [BLOCK_M], one of the pooling windows' columns."""
    odd = 0 if column == 1 else 1
    pair = tl.minimum(tl.maximum(q - (1 - column // 2) * odd, 0), (OW + 1 - odd) // 2 - 1)  # [BLOCK_M]
    conv = _convolved(
        corner_ptr,
        (y - first_y) * stride_x_r + (pair * 8 + 4 * odd),
        w,
        packed_ptr,
        offs_oc,
        OC,
        stride_x_c,
        stride_x_r,
        PIXELS=PIXELS,
        CP=CP,
        KERNEL=KERNEL,
        TAPS=TAPS,
        BLOCK_M=BLOCK_M,
        BLOCK_OC=BLOCK_OC,
        BLOCK_K=BLOCK_K,
    )
    if CP == 1:  # noqa: SIM102  (known when this compiles, at_edge is not)
        if at_edge:
            cut = window_cut(y, IH, KERNEL) * KERNEL + window_cut(2 * pair + odd, IW, KERNEL)  # [BLOCK_M]
            conv += _missing(packed_ptr, cut, offs_oc, OC, TAPS)
    return _best(best, conv)


@triton.jit(do_not_specialize=["IH", "IW", "OH", "OW", "PH", "PW", "tiles_r", "tiles_q"])
def _stem_pool_fwd_kernel(
    x_ptr,  # [N, CP, pairs, columns, 2], normalised and padded
    packed_ptr,  # [PLANES, TAPS, OC], packed with the sign of scale
    scale_ptr,  # [OC] fp32
    shift_ptr,  # [OC] fp32
    out_ptr,  # [N, PH, PW, OC]
    IH,
    IW,
    OH,
    OW,
    PH,
    PW,
    OC,
    tiles_r,
    tiles_q,
    stride_x_n,
    stride_x_c,
    stride_x_r,
    PIXELS: tl.constexpr,
    CP: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_OC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute BLOCK_R strips of ROWS pooled rows, BLOCK_Q columns; grid = (N * tiles_r * tiles_q, cdiv(OC, BLOCK_OC)).

    A strip takes 2 * ROWS + 1 rows of the convolution, the odd ones for the pooled rows above and below. Where a
    pooling window leaves the image, another of its own pixels stands in, which changes no maximum: so all addresses
    are in the image, and columns stay even or odd, which keeps their alignment.
    """
    BLOCK_M: tl.constexpr = BLOCK_R * BLOCK_Q
    pid = tl.program_id(0)
    n = (pid // (tiles_r * tiles_q)).to(tl.int64)
    first_p = pid // tiles_q % tiles_r * (BLOCK_R * ROWS)
    first_q = pid % tiles_q * BLOCK_Q
    p = first_p + tl.arange(0, BLOCK_M) // BLOCK_Q * ROWS  # [BLOCK_M], first pooled row of the strip
    q = first_q + tl.arange(0, BLOCK_M) % BLOCK_Q  # [BLOCK_M]
    offs_oc = tl.program_id(1) * BLOCK_OC + tl.arange(0, BLOCK_OC)  # [BLOCK_OC]
    mask_oc = offs_oc < OC
    first_y = tl.maximum(2 * first_p - 1, 0)
    corner_ptr = x_ptr + n * stride_x_n + first_y.to(tl.int64) * stride_x_r  # offsets from there fit 32 bits
    w = _taps(packed_ptr, 3 * TAPS if CP == 1 else 0, offs_oc, OC, BLOCK_K)
    scale = tl.abs(tl.load(scale_ptr + offs_oc, mask=mask_oc, other=1.0))[None, :]  # [1, BLOCK_OC]
    shift = tl.load(shift_ptr + offs_oc, mask=mask_oc, other=0.0)[None, :]
    columns_at_edge = (first_q == 0) | (2 * (2 * (first_q + BLOCK_Q) - 1) + KERNEL // 2 >= IW)
    if CP == 1:
        shift += _total(packed_ptr, offs_oc, OC, TAPS) * scale
    best = tl.full((BLOCK_M, BLOCK_OC), float("-inf"), dtype=tl.float32)
    for row in range(2 * ROWS + 1):
        y = tl.minimum(tl.maximum(2 * p - 1 + row, first_y), OH - 1)  # [BLOCK_M]
        top = 2 * first_p - 1 + row
        bottom = top + 2 * ROWS * (BLOCK_R - 1)
        at_edge = columns_at_edge | (2 * top < KERNEL // 2) | (2 * bottom + KERNEL // 2 >= IH)
        now = tl.full((BLOCK_M, BLOCK_OC), float("-inf"), dtype=tl.float32)
        if CP * TAPS == BLOCK_K:
            for column in tl.static_range(3):
                now = _with_column(
                    now,
                    column,
                    y,
                    q,
                    at_edge,
                    corner_ptr,
                    first_y,
                    w,
                    packed_ptr,
                    offs_oc,
                    IH,
                    IW,
                    OW,
                    OC,
                    stride_x_c,
                    stride_x_r,
                    PIXELS=PIXELS,
                    CP=CP,
                    KERNEL=KERNEL,
                    TAPS=TAPS,
                    BLOCK_M=BLOCK_M,
                    BLOCK_OC=BLOCK_OC,
                    BLOCK_K=BLOCK_K,
                )
        else:  # a loop of loops: three of them in a row take more registers
            for column in range(3):
                now = _with_column(
                    now,
                    column,
                    y,
                    q,
                    at_edge,
                    corner_ptr,
                    first_y,
                    w,
                    packed_ptr,
                    offs_oc,
                    IH,
                    IW,
                    OW,
                    OC,
                    stride_x_c,
                    stride_x_r,
                    PIXELS=PIXELS,
                    CP=CP,
                    KERNEL=KERNEL,
                    TAPS=TAPS,
                    BLOCK_M=BLOCK_M,
                    BLOCK_OC=BLOCK_OC,
                    BLOCK_K=BLOCK_K,
                )
        best = _best(best, now)
        if row % 2 == 0:
            if row > 0:
                out = rounded(_best(best * scale + shift, 0.0), out_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_OC]
                pooled = p + row // 2 - 1  # [BLOCK_M]
                out_ptrs = out_ptr + ((n * PH + pooled) * PW + q)[:, None] * OC + offs_oc[None, :]
                tl.store(out_ptrs, out, mask=((pooled < PH) & (q < PW))[:, None] & mask_oc[None, :])
            best = now


@triton.jit(do_not_specialize=["IH", "IW", "OH", "OW", "tiles_r", "tiles_q"])
def _stem_conv_kernel(
    x_ptr,  # [N, CP, pairs, columns, 2], normalised and padded
    packed_ptr,  # [PLANES, TAPS, OC]
    scale_ptr,  # [OC] fp32, only with HAS_NORM
    shift_ptr,  # [OC] fp32, only with HAS_NORM
    out_ptr,  # [N, OH, OW, OC]
    IH,
    IW,
    OH,
    OW,
    OC,
    tiles_r,
    tiles_q,
    stride_x_n,
    stride_x_c,
    stride_x_r,
    PIXELS: tl.constexpr,
    CP: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_OC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute BLOCK_R rows of the convolution, BLOCK_Q columns, without a pool; norm and ReLU with HAS_NORM."""
    BLOCK_M: tl.constexpr = BLOCK_R * BLOCK_Q
    pid = tl.program_id(0)
    n = (pid // (tiles_r * tiles_q)).to(tl.int64)
    y = pid // tiles_q % tiles_r * BLOCK_R + tl.arange(0, BLOCK_M) // BLOCK_Q  # [BLOCK_M]
    x = pid % tiles_q * BLOCK_Q + tl.arange(0, BLOCK_M) % BLOCK_Q  # [BLOCK_M]
    offs_oc = tl.program_id(1) * BLOCK_OC + tl.arange(0, BLOCK_OC)  # [BLOCK_OC]
    mask_oc = offs_oc < OC
    inside_y, inside_x = tl.minimum(y, OH - 1), tl.minimum(x, OW - 1)
    w = _taps(packed_ptr, 3 * TAPS if CP == 1 else 0, offs_oc, OC, BLOCK_K)
    conv = _convolved(
        x_ptr + n * stride_x_n,
        inside_y.to(tl.int64) * stride_x_r + inside_x * 4,
        w,
        packed_ptr,
        offs_oc,
        OC,
        stride_x_c,
        stride_x_r,
        PIXELS=PIXELS,
        CP=CP,
        KERNEL=KERNEL,
        TAPS=TAPS,
        BLOCK_M=BLOCK_M,
        BLOCK_OC=BLOCK_OC,
        BLOCK_K=BLOCK_K,
    )
    if CP == 1:
        cut = window_cut(inside_y, IH, KERNEL) * KERNEL + window_cut(inside_x, IW, KERNEL)  # [BLOCK_M]
        conv += _total(packed_ptr, offs_oc, OC, TAPS) + _missing(packed_ptr, cut, offs_oc, OC, TAPS)
    if HAS_NORM:
        scale = tl.load(scale_ptr + offs_oc, mask=mask_oc, other=0.0)[None, :]  # [1, BLOCK_OC]
        shift = tl.load(shift_ptr + offs_oc, mask=mask_oc, other=0.0)[None, :]
        conv = _best(conv * scale + shift, 0.0)
    out_ptrs = out_ptr + ((n * OH + y) * OW + x)[:, None] * OC + offs_oc[None, :]  # [BLOCK_M, BLOCK_OC]
    mask = ((y < OH) & (x < OW))[:, None] & mask_oc[None, :]
    tl.store(out_ptrs, rounded(conv, out_ptr.dtype.element_ty), mask=mask)


def _heuristic(pool, channels, taps, itemsize, height, width):
    """Choose a tile of 64 pixels, in fp32 of 32, and strips as long as leaves two programs for every multiprocessor.

    Three channels' pipelined slices leave room for a pool in the registers of 8 warps. fp32 has thin slices: without
    matrix instructions, a thread holds all of a slice's operands.
    """
    config = {"BLOCK_R": 4, "BLOCK_Q": 16, "BLOCK_K": taps, "num_warps": 4, "num_stages": 2}
    if itemsize == 4:
        config |= {"BLOCK_R": 2, "BLOCK_K": 16, "num_stages": 1}
    elif pool == channels == 3:
        config["num_warps"] = 8
    if pool == 3:
        tiles = cdiv(height, config["BLOCK_R"]) * cdiv(width, config["BLOCK_Q"])
        config["ROWS"] = next((rows for rows in (16, 8, 4, 2) if tiles >= 2 * MULTIPROCESSORS * rows), 1)
    return config


def convolve(pixels, window, mean, std, weight, norm, pool):
    """Return [N, PH, PW, OC] with ``norm`` = (scale, shift); with None the convolution alone, whose ``pool`` is 1."""
    packed = pack_taps(weight, mean, std, norm[0] if pool == 3 else None)
    return _convolve_packed(pixels, window, mean, std, packed, norm, pool)


def _convolve_packed(pixels, window, mean, std, packed, norm, pool):
    n, ih, iw, channels = pixels.shape
    taps, oc = packed.shape[1:]
    kernel = isqrt(taps) - 1
    oh, ow = half(ih), half(iw)
    ph, pw = (half(oh), half(ow)) if pool == 3 else (oh, ow)
    out = torch.empty((n, ph, pw, oc), dtype=packed.dtype, device=pixels.device)
    if out.numel() == 0:
        return out
    x = padded(pixels, window, mean, std, kernel, packed.dtype)
    block_oc = min(64, max(16, tuning.bucket(oc)))
    scale, shift = (None, None) if norm is None else (norm[0].contiguous(), norm[1].contiguous())
    key = f"fwd-k{kernel}-pool{pool}-c{channels}-px{tuning.bucket(ph * pw)}-{str(packed.dtype).removeprefix('torch.')}"
    heuristic = _heuristic(pool, channels, taps, packed.element_size(), ph, pw)
    config = tuning.pick("stem", key, pixels.device, heuristic)
    tiles_r = cdiv(ph, config["BLOCK_R"] * config.get("ROWS", 1))
    tiles_q = cdiv(pw, config["BLOCK_Q"])
    options = {
        "x_ptr": x,
        "packed_ptr": packed,
        "scale_ptr": scale,
        "shift_ptr": shift,
        "out_ptr": out,
        "IH": ih,
        "IW": iw,
        "OH": oh,
        "OW": ow,
        "OC": oc,
        "tiles_r": tiles_r,
        "tiles_q": tiles_q,
        "PIXELS": "float" if pixels.is_floating_point() else "integer",
        "CP": channels,
        "KERNEL": kernel,
        "TAPS": taps,
        "BLOCK_OC": block_oc,
        **config,
        **{f"stride_x_{dim}": stride for dim, stride in zip("ncr", x.stride(), strict=False)},
    }
    grid = (n * tiles_r * tiles_q, cdiv(oc, block_oc))
    if pool == 3:
        _stem_pool_fwd_kernel[grid](**options, PH=ph, PW=pw, enable_fp_fusion=True)
    else:
        _stem_conv_kernel[grid](**options, HAS_NORM=norm is not None, enable_fp_fusion=True)
    return out


def stem_fwd(pixels, window, mean, std, weight, scale, shift, pool):
    """Return [N, PH, PW, OC], dtype of ``weight``."""
    return convolve(pixels, window, mean, std, weight, (scale, shift), pool)


def stem_packed_fwd(pixels, window, mean, std, taps, scale, shift, pool):
    """Return [N, PH, PW, OC], dtype of ``taps``, which :func:`.triton_pack.pack_taps` made."""
    return _convolve_packed(pixels, window, mean, std, taps, (scale, shift), pool)
