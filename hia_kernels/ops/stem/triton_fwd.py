"""Triton forward of ``stem``: raw pixels to pooled features, nothing of full resolution written.

The convolution is an implicit GEMM over its taps (Chetlur et al. 2014, section 3). Two convolution rows, one below the
other, are two pixels apart: they share a tile of K + 2 rows by K columns of pixels, each with its own weights, zero at
the other's taps. With one slot more that is 64 taps for K = 7 and 16 for K = 3, depths that tensor cores take.
"""

from __future__ import annotations

from math import isqrt

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.triton_math import INTERPRETED, dot

MULTIPROCESSORS = 132  # of an H100 or H200
PACK_OC = 16  # output channels packed by a program
PLANES = 4  # of packed taps: one per channel, and one for the interior of a grey image


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Round fp32 to the nearest of dtype; Triton's interpreter would truncate bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _stem_pack_kernel(
    weight_ptr,  # [OC, 3, K, K]
    mean_ptr,  # [3] fp32
    std_ptr,  # [3] fp32
    scale_ptr,  # [OC] fp32, only with HAS_SIGN
    packed_ptr,  # [2, PLANES, TAPS, OC]
    OC,
    stride_weight_o,
    stride_weight_c,
    stride_weight_h,
    stride_weight_w,
    PLANES: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_SIGN: tl.constexpr,
    BLOCK_OC: tl.constexpr,
):
    """Pack the weights by tap, for the upper and the lower row of a pair; grid = (2, cdiv(OC, BLOCK_OC)).

    The last plane is for the interior of a grey image. A pixel normalised by the middle channel, x = (p - mean_1) /
    std_1, gives all three channels as x std_1 / std_c + (mean_1 - mean_c) / std_c. The factor is multiplied into the
    weights; the offset, summed over all taps, is the weight of the extra slot. Where taps lie in the padding this would
    be wrong. HAS_SIGN negates channels of negative scale, so that their pool is a maximum too.
    """
    is_lower = tl.program_id(0)
    taps = tl.arange(0, TAPS)  # [TAPS]
    ky, kx = taps // KERNEL - 2 * is_lower, taps % KERNEL
    offs_oc = tl.program_id(1) * BLOCK_OC + tl.arange(0, BLOCK_OC)  # [BLOCK_OC]
    mask_oc = (offs_oc < OC)[None, :]
    mask = ((ky >= 0) & (ky < KERNEL))[:, None] & mask_oc  # [TAPS, BLOCK_OC]
    mask_out = (taps < TAPS)[:, None] & mask_oc
    w_ptrs = weight_ptr + offs_oc[None, :] * stride_weight_o
    w_ptrs = w_ptrs + ky[:, None] * stride_weight_h + kx[:, None] * stride_weight_w  # [TAPS, BLOCK_OC]
    packed_ptrs = packed_ptr + (is_lower * PLANES * TAPS + taps)[:, None] * OC + offs_oc[None, :]
    sign = tl.full((1, BLOCK_OC), 1.0, dtype=tl.float32)
    if HAS_SIGN:
        scale = tl.load(scale_ptr + offs_oc, mask=offs_oc < OC, other=1.0)[None, :]  # [1, BLOCK_OC]
        sign = tl.where(scale < 0, -1.0, 1.0)

    gain = tl.zeros((TAPS, BLOCK_OC), dtype=tl.float32)
    offset = tl.zeros((TAPS, BLOCK_OC), dtype=tl.float32)
    for c in tl.static_range(3):
        w = tl.load(w_ptrs + c * stride_weight_c, mask=mask, other=0.0).to(tl.float32) * sign  # [TAPS, BLOCK_OC]
        tl.store(packed_ptrs + c * TAPS * OC, rounded(w, packed_ptr.dtype.element_ty), mask=mask_out)
        std = tl.load(std_ptr + c)
        gain += w * tl.div_rn(tl.load(std_ptr + 1), std)
        offset += w * tl.div_rn(tl.load(mean_ptr + 1) - tl.load(mean_ptr + c), std)
    gain = tl.where((taps == TAPS - 1)[:, None], tl.sum(offset, axis=0)[None, :], gain)
    tl.store(packed_ptrs + 3 * TAPS * OC, rounded(gain, packed_ptr.dtype.element_ty), mask=mask_out)


@triton.jit
def _normalised(p, low, high, mean, std, PIXELS: tl.constexpr, IS_FP32: tl.constexpr):
    """Apply window and normalisation to raw pixels, in fp32; with fewer operations if rounded to 16 bits afterwards."""
    if PIXELS == "uint16":  # passed as int16
        p = p.to(tl.int32) & 0xFFFF
    p = p.to(tl.float32) - low
    if IS_FP32:
        width = tl.zeros_like(p) + (high - low)
        p = tl.clamp(tl.div_rn(p, width), 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.div_rn(p - mean, tl.zeros_like(p) + std)
    else:
        gain = tl.div_rn(1.0, std)
        black, white = -mean * gain, (1.0 - mean) * gain
        x = p * (tl.div_rn(1.0, high - low) * gain) + black
        x = tl.clamp(x, tl.minimum(black, white), tl.maximum(black, white), propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _row_pair(
    pixels_ptr,
    window_ptr,
    mean_ptr,
    std_ptr,
    packed_ptr,
    top,
    left,
    corner_y,
    corner_x,
    at_edge,
    offs_oc,
    IH,
    IW,
    OC,
    stride_pixels_h,
    stride_pixels_w,
    stride_pixels_c,
    PIXELS: tl.constexpr,
    CP: tl.constexpr,
    PLANES: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute two rows of the convolution, [BLOCK_M, BLOCK_OC] fp32, whose taps begin at ``top``, ``left`` [BLOCK_M].

    ``pixels_ptr`` points at (corner_y, corner_x): offsets from there fit 32 bits. A grey image is three equal channels
    ``at_edge``, where taps may lie outside, and one elsewhere.
    """
    first, last = 0, 3
    if CP == 1:
        first = tl.where(at_edge, 0, 3)
        last = tl.where(at_edge, 3, 4)
    upper = tl.zeros((BLOCK_M, BLOCK_OC), dtype=tl.float32)
    lower = tl.zeros((BLOCK_M, BLOCK_OC), dtype=tl.float32)
    low, high = tl.load(window_ptr), tl.load(window_ptr + 1)
    pixels = (top - corner_y) * stride_pixels_h + (left - corner_x) * stride_pixels_w  # [BLOCK_M]
    for plane in range(first, last):
        channel = tl.where(plane == 3, 1, plane)
        mean, std = tl.load(mean_ptr + channel), tl.load(std_ptr + channel)
        channel_ptr = pixels_ptr
        if CP == 3:
            channel_ptr += tl.cast(stride_pixels_c, tl.int64) * plane
        for step in range(TAPS // BLOCK_K):
            slots = step * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            ky = slots // KERNEL
            kx = slots - ky * KERNEL
            iy, ix = top[:, None] + ky[None, :], left[:, None] + kx[None, :]  # [BLOCK_M, BLOCK_K]
            is_tap = (slots < TAPS - 1)[None, :]
            inside = (iy >= 0) & (iy < IH) & (ix >= 0) & (ix < IW) & is_tap
            offsets = pixels[:, None] + (ky * stride_pixels_h + kx * stride_pixels_w)[None, :]  # [BLOCK_M, BLOCK_K]
            x = tl.load(channel_ptr + offsets, mask=inside, other=0)
            x = _normalised(x, low, high, mean, std, PIXELS, IS_FP32=packed_ptr.dtype.element_ty == tl.float32)
            x = tl.where(inside, x, tl.where(is_tap, 0.0, 1.0))
            of_upper, of_lower = x, x  # [BLOCK_M, BLOCK_K]
            if PIXELS == "float":  # a NaN among the other row's taps would survive its zero weight
                of_upper = tl.where(((ky < KERNEL) | (ky == KERNEL + 2))[None, :], x, 0.0)
                of_lower = tl.where((ky >= 2)[None, :], x, 0.0)
            w_ptrs = packed_ptr + (plane * TAPS + slots)[:, None] * OC + offs_oc[None, :]  # [BLOCK_K, BLOCK_OC]
            mask_w = (slots < TAPS)[:, None] & (offs_oc < OC)[None, :]
            w = tl.load(w_ptrs, mask=mask_w, other=0.0)
            upper = dot(rounded(of_upper, w.dtype), w, upper)
            w = tl.load(w_ptrs + PLANES * TAPS * OC, mask=mask_w, other=0.0)
            lower = dot(rounded(of_lower, w.dtype), w, lower)
    return upper, lower


@triton.jit
def _corner(pixels_ptr, n, y, x, stride_pixels_n, stride_pixels_h, stride_pixels_w):
    """Return a pointer to image n's pixel (y, x), which may lie outside; an image may hold more than 2**31 elements."""
    along = y.to(tl.int64) * stride_pixels_h + x.to(tl.int64) * stride_pixels_w
    return pixels_ptr + n * stride_pixels_n + along


@triton.jit
def _best(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(
    do_not_specialize=["IH", "IW", "OH", "OW", "PH", "PW", "tiles_r", "tiles_q", "stride_pixels_n", "stride_pixels_h"]
)
def _stem_pool_fwd_kernel(
    pixels_ptr,  # [N, IH, IW, CP]
    window_ptr,  # [N, 2] fp32
    mean_ptr,  # [3] fp32
    std_ptr,  # [3] fp32
    packed_ptr,  # [2, PLANES, TAPS, OC], packed with the sign of scale
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
    stride_pixels_n,
    stride_pixels_h,
    stride_pixels_w,
    stride_pixels_c,
    PIXELS: tl.constexpr,
    CP: tl.constexpr,
    PLANES: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_OC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute BLOCK_R strips of ROWS pooled rows, BLOCK_Q columns; grid = (N * tiles_r * tiles_q, cdiv(OC, BLOCK_OC)).

    A pooled row takes a pair of convolution rows and the lower row of the pair above, kept from the step before.
    """
    PAD: tl.constexpr = KERNEL // 2
    BLOCK_M: tl.constexpr = BLOCK_R * BLOCK_Q
    pid = tl.program_id(0)
    n = (pid // (tiles_r * tiles_q)).to(tl.int64)
    first_p = pid // tiles_q % tiles_r * (BLOCK_R * ROWS)
    first_q = pid % tiles_q * BLOCK_Q
    p = first_p + tl.arange(0, BLOCK_M) // BLOCK_Q * ROWS  # [BLOCK_M], first pooled row of the strip
    q = first_q + tl.arange(0, BLOCK_M) % BLOCK_Q  # [BLOCK_M]
    offs_oc = tl.program_id(1) * BLOCK_OC + tl.arange(0, BLOCK_OC)  # [BLOCK_OC]
    mask_oc = offs_oc < OC
    corner_y, corner_x = 4 * (first_p - 1) - PAD, 2 * (2 * first_q - 1) - PAD
    corner_ptr = _corner(pixels_ptr, n, corner_y, corner_x, stride_pixels_n, stride_pixels_h, stride_pixels_w)
    scale = tl.abs(tl.load(scale_ptr + offs_oc, mask=mask_oc, other=1.0))[None, :]  # [1, BLOCK_OC]
    shift = tl.load(shift_ptr + offs_oc, mask=mask_oc, other=0.0)[None, :]
    above = tl.full((BLOCK_M, BLOCK_OC), float("-inf"), dtype=tl.float32)
    for row in range(ROWS + 1):
        y = 2 * (p + row - 1)  # [BLOCK_M], the pair's upper row
        top = corner_y + 4 * row
        rows_at_edge = (top < 0) | (top + 4 * ROWS * (BLOCK_R - 1) + KERNEL + 2 > IH)
        best, below = above, tl.full((BLOCK_M, BLOCK_OC), float("-inf"), dtype=tl.float32)
        for column in range(3):
            x = 2 * q - 1 + column  # [BLOCK_M]
            left = corner_x + 2 * column
            at_edge = rows_at_edge | (left < 0) | (left + 4 * (BLOCK_Q - 1) + KERNEL > IW)
            upper, lower = _row_pair(
                corner_ptr,
                window_ptr + 2 * n,
                mean_ptr,
                std_ptr,
                packed_ptr,
                2 * y - PAD,
                2 * x - PAD,
                corner_y,
                corner_x,
                at_edge,
                offs_oc,
                IH,
                IW,
                OC,
                stride_pixels_h,
                stride_pixels_w,
                stride_pixels_c,
                PIXELS=PIXELS,
                CP=CP,
                PLANES=PLANES,
                KERNEL=KERNEL,
                TAPS=TAPS,
                BLOCK_M=BLOCK_M,
                BLOCK_OC=BLOCK_OC,
                BLOCK_K=BLOCK_K,
            )
            in_columns = (x >= 0) & (x < OW)  # the pool ignores the padding
            upper = tl.where((in_columns & (y >= 0) & (y < OH))[:, None], upper, float("-inf"))
            lower = tl.where((in_columns & (y + 1 >= 0) & (y + 1 < OH))[:, None], lower, float("-inf"))
            best = _best(best, _best(upper, lower))
            below = _best(below, lower)
        above = below
        if row > 0:
            out = rounded(_best(best * scale + shift, 0.0), out_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_OC]
            pooled = p + row - 1  # [BLOCK_M]
            out_ptrs = out_ptr + ((n * PH + pooled) * PW + q)[:, None] * OC + offs_oc[None, :]
            tl.store(out_ptrs, out, mask=((pooled < PH) & (q < PW))[:, None] & mask_oc[None, :])


@triton.jit(do_not_specialize=["IH", "IW", "OH", "OW", "tiles_r", "tiles_q", "stride_pixels_n", "stride_pixels_h"])
def _stem_conv_kernel(
    pixels_ptr,  # [N, IH, IW, CP]
    window_ptr,  # [N, 2] fp32
    mean_ptr,  # [3] fp32
    std_ptr,  # [3] fp32
    packed_ptr,  # [2, PLANES, TAPS, OC]
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
    stride_pixels_n,
    stride_pixels_h,
    stride_pixels_w,
    stride_pixels_c,
    PIXELS: tl.constexpr,
    CP: tl.constexpr,
    PLANES: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_OC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute BLOCK_R pairs of convolution rows, BLOCK_Q columns, without a pool; norm and ReLU with HAS_NORM."""
    PAD: tl.constexpr = KERNEL // 2
    BLOCK_M: tl.constexpr = BLOCK_R * BLOCK_Q
    pid = tl.program_id(0)
    n = (pid // (tiles_r * tiles_q)).to(tl.int64)
    first_y = pid // tiles_q % tiles_r * (2 * BLOCK_R)
    first_x = pid % tiles_q * BLOCK_Q
    y = first_y + tl.arange(0, BLOCK_M) // BLOCK_Q * 2  # [BLOCK_M], the pair's upper row
    x = first_x + tl.arange(0, BLOCK_M) % BLOCK_Q  # [BLOCK_M]
    offs_oc = tl.program_id(1) * BLOCK_OC + tl.arange(0, BLOCK_OC)  # [BLOCK_OC]
    mask_oc = offs_oc < OC
    corner_y, corner_x = 2 * first_y - PAD, 2 * first_x - PAD
    corner_ptr = _corner(pixels_ptr, n, corner_y, corner_x, stride_pixels_n, stride_pixels_h, stride_pixels_w)
    at_edge = (corner_y < 0) | (corner_y + 4 * (BLOCK_R - 1) + KERNEL + 2 > IH)
    at_edge = at_edge | (corner_x < 0) | (corner_x + 2 * (BLOCK_Q - 1) + KERNEL > IW)
    upper, lower = _row_pair(
        corner_ptr,
        window_ptr + 2 * n,
        mean_ptr,
        std_ptr,
        packed_ptr,
        2 * y - PAD,
        2 * x - PAD,
        corner_y,
        corner_x,
        at_edge,
        offs_oc,
        IH,
        IW,
        OC,
        stride_pixels_h,
        stride_pixels_w,
        stride_pixels_c,
        PIXELS=PIXELS,
        CP=CP,
        PLANES=PLANES,
        KERNEL=KERNEL,
        TAPS=TAPS,
        BLOCK_M=BLOCK_M,
        BLOCK_OC=BLOCK_OC,
        BLOCK_K=BLOCK_K,
    )
    if HAS_NORM:
        scale = tl.load(scale_ptr + offs_oc, mask=mask_oc, other=0.0)[None, :]  # [1, BLOCK_OC]
        shift = tl.load(shift_ptr + offs_oc, mask=mask_oc, other=0.0)[None, :]
        upper, lower = _best(upper * scale + shift, 0.0), _best(lower * scale + shift, 0.0)
    out_ptrs = out_ptr + ((n * OH + y) * OW + x)[:, None] * OC + offs_oc[None, :]  # [BLOCK_M, BLOCK_OC]
    mask = ((y < OH) & (x < OW))[:, None] & mask_oc[None, :]
    tl.store(out_ptrs, rounded(upper, out_ptr.dtype.element_ty), mask=mask)
    mask = ((y + 1 < OH) & (x < OW))[:, None] & mask_oc[None, :]
    tl.store(out_ptrs + tl.cast(OW, tl.int64) * OC, rounded(lower, out_ptr.dtype.element_ty), mask=mask)


def half(size):
    """Return the side of an image after stride 2, with an odd kernel and half of it as padding."""
    return (size - 1) // 2 + 1


def pixel_kind(pixels):
    """Return the pixels as Triton takes them, and their kind; uint16 goes as int16, which torch supports better."""
    if pixels.dtype == torch.uint16:
        return pixels.view(torch.int16), "uint16"
    return pixels, "float" if pixels.is_floating_point() else "uint8"


def pack_taps(weight, mean, std, sign_of):
    """Return [2, PLANES, taps, OC], for grey and other images; ``sign_of`` is the norm's scale where a pool follows."""
    oc, _, kernel, _ = weight.shape
    taps = (kernel + 1) ** 2
    packed = torch.empty((2, PLANES, taps, oc), dtype=weight.dtype, device=weight.device)
    if oc:
        _stem_pack_kernel[(2, triton.cdiv(oc, PACK_OC))](
            weight_ptr=weight,
            mean_ptr=mean.contiguous(),
            std_ptr=std.contiguous(),
            scale_ptr=None if sign_of is None else sign_of.contiguous(),
            packed_ptr=packed,
            OC=oc,
            **{f"stride_weight_{dim}": stride for dim, stride in zip("ochw", weight.stride(), strict=True)},
            PLANES=PLANES,
            KERNEL=kernel,
            TAPS=taps,
            HAS_SIGN=sign_of is not None,
            BLOCK_OC=PACK_OC,
        )
    return packed


def _heuristic(pool, taps, itemsize, height, width, device):
    """Choose a tile of 64 pixels, and strips as long as leaves two programs for every multiprocessor.

    Two tiles of sums, two of maxima and a slice of taps fill a thread's registers; before Hopper, the product's
    operands are there too, and the slice is shorter. In fp32 the tile has 32 pixels: from 64 on, Triton 3.6 turns an
    ieee product into TF32 on Blackwell if an operand had 16 bits or fewer when it was loaded.
    """
    if itemsize == 4:
        warps = 8 if pool == 3 else 4
        config = {"BLOCK_R": 2, "BLOCK_Q": 16, "BLOCK_K": 16, "num_warps": warps, "num_stages": 1}
    else:
        before_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9
        block_k = min(taps, 16 if before_hopper else 32)
        config = {"BLOCK_R": 4, "BLOCK_Q": 16, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 1}
    if pool == 3:
        tiles = triton.cdiv(height, 4) * triton.cdiv(width, 16)
        config["ROWS"] = next((rows for rows in (16, 8, 4) if tiles >= 2 * MULTIPROCESSORS * rows), 2)
    return config


def convolve(pixels, window, mean, std, weight, norm, pool):
    """Return [N, PH, PW, OC] with ``norm`` = (scale, shift); with None the convolution alone, whose ``pool`` is 1."""
    packed = pack_taps(weight, mean, std, norm[0] if pool == 3 else None)
    return _convolve_packed(pixels, window, mean, std, packed, norm, pool)


def _convolve_packed(pixels, window, mean, std, packed, norm, pool):
    pixels, kind = pixel_kind(pixels)
    n, ih, iw, channels = pixels.shape
    taps, oc = packed.shape[2:]
    kernel = isqrt(taps) - 1
    oh, ow = half(ih), half(iw)
    ph, pw = (half(oh), half(ow)) if pool == 3 else (oh, ow)
    out = torch.empty((n, ph, pw, oc), dtype=packed.dtype, device=pixels.device)
    if out.numel() == 0:
        return out
    block_oc = min(64, max(16, tuning.bucket(oc)))
    scale, shift = (None, None) if norm is None else (norm[0].contiguous(), norm[1].contiguous())
    key = f"fwd-k{kernel}-pool{pool}-c{channels}-px{tuning.bucket(ph * pw)}-{str(packed.dtype).removeprefix('torch.')}"
    config = tuning.pick(
        "stem", key, pixels.device, _heuristic(pool, taps, packed.element_size(), ph, pw, pixels.device)
    )
    # rows a program writes: strips of pooled rows, or pairs
    tiles_r = triton.cdiv(ph, config["BLOCK_R"] * config.get("ROWS", 2))
    tiles_q = triton.cdiv(pw, config["BLOCK_Q"])
    options = {
        "pixels_ptr": pixels,
        "window_ptr": window.contiguous(),
        "mean_ptr": mean.contiguous(),
        "std_ptr": std.contiguous(),
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
        "PIXELS": kind,
        "CP": channels,
        "PLANES": PLANES,
        "KERNEL": kernel,
        "TAPS": taps,
        "BLOCK_OC": block_oc,
        **config,
        **{f"stride_pixels_{dim}": stride for dim, stride in zip("nhwc", pixels.stride(), strict=True)},
    }
    grid = (n * tiles_r * tiles_q, triton.cdiv(oc, block_oc))
    if pool == 3:
        _stem_pool_fwd_kernel[grid](**options, PH=ph, PW=pw)
    else:
        _stem_conv_kernel[grid](**options, HAS_NORM=norm is not None)
    return out


def stem_fwd(pixels, window, mean, std, weight, scale, shift, pool):
    """Return [N, PH, PW, OC], dtype of ``weight``."""
    return convolve(pixels, window, mean, std, weight, (scale, shift), pool)


def stem_packed_fwd(pixels, window, mean, std, taps, scale, shift, pool):
    """Return [N, PH, PW, OC], dtype of ``taps``, which :func:`pack_taps` made."""
    return _convolve_packed(pixels, window, mean, std, taps, (scale, shift), pool)
