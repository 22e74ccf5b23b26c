"""Triton kernels that prepare the stem's convolution: weights packed by tap, pixels normalised and padded.

Both are laid out by pairs of rows. A row of pixels that a convolution of stride 2 begins at is the first of a pair, so
a window is (K + 1) / 2 whole pairs; in each, its K + 1 columns of two pixels lie side by side. For K = 7 a window is 4
segments of 16 elements, for K = 3 it is 2 of 8, and windows two columns apart begin 4 elements apart.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.triton_math import INTERPRETED
from ...core.tuning import cdiv

PACK_OC = 16  # output channels packed by a program
PACK_SLOTS = 8  # of them
PLANES = 5  # of packed taps: one per channel; of a grey image; and a grey image's offsets


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Round fp32 to the nearest of dtype; Triton's interpreter would truncate bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tap_of(slots, KERNEL: tl.constexpr):
    """Return row and column of the taps in these slots; past the kernel, KERNEL, in the free ones."""
    return slots // (2 * KERNEL + 2) * 2 + slots % 2, slots // 2 % (KERNEL + 1)


@triton.jit
def _counts(tap, cut, KERNEL: tl.constexpr):
    """Tell whether a row (or column) of taps lies inside the image, by the window's number of :func:`window_cut`."""
    PAD: tl.constexpr = KERNEL // 2
    return (tap < KERNEL) & tl.where(cut <= PAD, tap >= cut, tap < KERNEL + PAD - cut)


@triton.jit
def window_cut(place, size, KERNEL: tl.constexpr):
    """Number what a convolution's window loses along an axis: 0 nothing, 1 to PAD so much before, PAD + that after."""
    PAD: tl.constexpr = KERNEL // 2
    after = 2 * place + PAD - (size - 1)
    return tl.where(after > 0, PAD + after, tl.maximum(PAD - 2 * place, 0))


@triton.jit
def _stem_pack_kernel(
    weight_ptr,  # [OC, 3, K, K]
    mean_ptr,  # [3] fp32
    std_ptr,  # [3] fp32
    scale_ptr,  # [OC] fp32, only with HAS_SIGN
    packed_ptr,  # [PLANES, TAPS, OC]
    OC,
    stride_weight_o,
    stride_weight_c,
    stride_weight_h,
    stride_weight_w,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_SIGN: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_OC: tl.constexpr,
):
    """Pack the weights by tap; grid = (TAPS // BLOCK_SLOTS, cdiv(OC, BLOCK_OC)).

    A grey pixel normalised by the middle channel, x = (p - mean_1) / std_1, gives all three channels as
    x std_1 / std_c + (mean_1 - mean_c) / std_c. The factor is multiplied into the weights, the fourth plane. The
    offset, summed over all taps, begins the last plane, which ends with what that rounds away. In between, slot
    cut_y * K + cut_x holds what a window lacks of it that the image's border cuts so (:func:`window_cut`): the padding
    is zero for each channel. HAS_SIGN negates channels of negative scale, so that their pool is a maximum too.
    """
    slots = tl.arange(0, TAPS)  # [TAPS]
    ky, kx = tap_of(slots, KERNEL)
    offs_oc = tl.program_id(1) * BLOCK_OC + tl.arange(0, BLOCK_OC)  # [BLOCK_OC]
    mask_oc = (offs_oc < OC)[None, :]
    mask = ((ky < KERNEL) & (kx < KERNEL))[:, None] & mask_oc  # [TAPS, BLOCK_OC]
    w_ptrs = weight_ptr + offs_oc[None, :] * stride_weight_o
    w_ptrs = w_ptrs + ky[:, None] * stride_weight_h + kx[:, None] * stride_weight_w  # [TAPS, BLOCK_OC]
    packed_ptrs = packed_ptr + slots[:, None] * OC + offs_oc[None, :]
    own = (slots // BLOCK_SLOTS == tl.program_id(0))[:, None] & mask_oc  # what this program writes
    sign = tl.full((1, BLOCK_OC), 1.0, dtype=tl.float32)
    if HAS_SIGN:
        scale = tl.load(scale_ptr + offs_oc, mask=offs_oc < OC, other=1.0)[None, :]  # [1, BLOCK_OC]
        sign = tl.where(scale < 0, -1.0, 1.0)

    gain = tl.zeros((TAPS, BLOCK_OC), dtype=tl.float32)
    offset = tl.zeros((TAPS, BLOCK_OC), dtype=tl.float32)
    for c in tl.static_range(3):
        w = tl.load(w_ptrs + c * stride_weight_c, mask=mask, other=0.0).to(tl.float32) * sign  # [TAPS, BLOCK_OC]
        tl.store(packed_ptrs + c * TAPS * OC, rounded(w, packed_ptr.dtype.element_ty), mask=own)
        std = tl.load(std_ptr + c)
        gain += w * tl.div_rn(tl.load(std_ptr + 1), std)
        offset += w * tl.div_rn(tl.load(mean_ptr + 1) - tl.load(mean_ptr + c), std)
    tl.store(packed_ptrs + 3 * TAPS * OC, rounded(gain, packed_ptr.dtype.element_ty), mask=own)

    cuts = tl.program_id(0) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)  # [BLOCK_SLOTS]
    rows = _counts(ky[None, :], (cuts // KERNEL)[:, None], KERNEL)
    columns = _counts(kx[None, :], (cuts % KERNEL)[:, None], KERNEL)  # [BLOCK_SLOTS, TAPS]
    lost = (ky < KERNEL)[None, :] & (kx < KERNEL)[None, :] & ~(rows & columns)
    lost = tl.sum(tl.where(lost[:, :, None], offset[None, :, :], 0.0), axis=1)  # [BLOCK_SLOTS, BLOCK_OC]
    total = tl.sum(offset, axis=0)[None, :]  # [1, BLOCK_OC]
    rest = total - rounded(total, packed_ptr.dtype.element_ty).to(tl.float32)
    missing = tl.where((cuts == 0)[:, None], total, tl.where((cuts == TAPS - 1)[:, None], rest, -lost))
    cut_ptrs = packed_ptr + (4 * TAPS + cuts)[:, None] * OC + offs_oc[None, :]  # [BLOCK_SLOTS, BLOCK_OC]
    tl.store(cut_ptrs, rounded(missing, packed_ptr.dtype.element_ty), mask=mask_oc)


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


@triton.jit(do_not_specialize=["IH", "IW", "pairs", "tiles", "stride_pixels_n", "stride_pixels_h"])
def _stem_pad_kernel(
    pixels_ptr,  # [N, IH, IW, CP]
    window_ptr,  # [N, 2] fp32
    mean_ptr,  # [3] fp32
    std_ptr,  # [3] fp32
    x_ptr,  # [N, CP, pairs, columns, 2]
    IH,
    IW,
    pairs,
    columns,
    tiles,
    stride_pixels_n,
    stride_pixels_h,
    stride_pixels_w,
    stride_pixels_c,
    PIXELS: tl.constexpr,
    CP: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise and pad BLOCK columns of a pair of rows; grid = (N * CP * pairs * tiles,). Padding is exactly zero."""
    PAD: tl.constexpr = KERNEL // 2
    pid = tl.program_id(0)
    column = pid % tiles * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    pair = pid // tiles  # of all images
    plane = pair // pairs
    n = (plane // CP).to(tl.int64)
    channel = plane % CP
    mean, std = tl.load(mean_ptr + channel), tl.load(std_ptr + channel)
    if CP == 1:  # a grey image takes the middle one's
        mean, std = tl.load(mean_ptr + 1), tl.load(std_ptr + 1)
    low, high = tl.load(window_ptr + 2 * n), tl.load(window_ptr + 2 * n + 1)
    iy = pair % pairs * 2 - PAD + tl.arange(0, 2)[None, :]  # [1, 2]
    ix = column[:, None] - PAD  # [BLOCK, 1]
    inside = (iy >= 0) & (iy < IH) & (ix >= 0) & (ix < IW)  # [BLOCK, 2]
    row, place = tl.minimum(tl.maximum(iy, 0), IH - 1), tl.minimum(tl.maximum(ix, 0), IW - 1)
    corner_ptr = pixels_ptr + n * stride_pixels_n + channel.to(tl.int64) * stride_pixels_c
    pixels = tl.load(
        corner_ptr + row.to(tl.int64) * stride_pixels_h + place.to(tl.int64) * stride_pixels_w, mask=inside, other=0
    )
    x = _normalised(pixels, low, high, mean, std, PIXELS, IS_FP32=x_ptr.dtype.element_ty == tl.float32)
    x = rounded(tl.where(inside, x, 0.0), x_ptr.dtype.element_ty)
    x_ptrs = x_ptr + pair.to(tl.int64) * (2 * columns) + (2 * column[:, None] + tl.arange(0, 2)[None, :])
    tl.store(x_ptrs, x, mask=(column < columns)[:, None])


def half(size):
    """Return the side of an image after stride 2, with an odd kernel and half of it as padding."""
    return (size - 1) // 2 + 1


def pixel_kind(pixels):
    """Return the pixels as Triton takes them, and their kind; uint16 goes as int16, which torch supports better."""
    if pixels.dtype == torch.uint16:
        return pixels.view(torch.int16), "uint16"
    return pixels, "float" if pixels.is_floating_point() else "uint8"


def pack_taps(weight, mean, std, sign_of):
    """Return [PLANES, taps, OC], for grey and other images; ``sign_of`` is the norm's scale where a pool follows."""
    oc, _, kernel, _ = weight.shape
    taps = (kernel + 1) ** 2
    packed = torch.empty((PLANES, taps, oc), dtype=weight.dtype, device=weight.device)
    if oc:
        _stem_pack_kernel[(taps // PACK_SLOTS, cdiv(oc, PACK_OC))](
            weight_ptr=weight,
            mean_ptr=mean.contiguous(),
            std_ptr=std.contiguous(),
            scale_ptr=None if sign_of is None else sign_of.contiguous(),
            packed_ptr=packed,
            OC=oc,
            **{f"stride_weight_{dim}": stride for dim, stride in zip("ochw", weight.stride(), strict=True)},
            KERNEL=kernel,
            TAPS=taps,
            HAS_SIGN=sign_of is not None,
            BLOCK_SLOTS=PACK_SLOTS,
            BLOCK_OC=PACK_OC,
            enable_fp_fusion=True,
        )
    return packed


def padded(pixels, window, mean, std, kernel, dtype):
    """Return the normalised pixels by pairs of rows, [N, CP, pairs, columns, 2], zero around the image.

    Every window of the convolution lies inside; rows are multiples of 16 elements.
    """
    n, ih, iw, channels = pixels.shape
    pairs = half(ih) + kernel // 2
    columns = cdiv(2 * half(iw) + kernel - 1, 8) * 8
    x = torch.empty((n, channels, pairs, columns, 2), dtype=dtype, device=pixels.device)
    pixels, kind = pixel_kind(pixels)
    key, block = f"pad-c{channels}-w{tuning.bucket(columns)}", 512 if columns <= 2048 else 1024
    config = tuning.pick("stem", key, pixels.device, {"BLOCK": block, "num_warps": 4})
    tiles = cdiv(columns, config["BLOCK"])
    _stem_pad_kernel[(n * channels * pairs * tiles,)](
        pixels_ptr=pixels,
        window_ptr=window.contiguous(),
        mean_ptr=mean.contiguous(),
        std_ptr=std.contiguous(),
        x_ptr=x,
        IH=ih,
        IW=iw,
        pairs=pairs,
        columns=columns,
        tiles=tiles,
        PIXELS=kind,
        CP=channels,
        KERNEL=kernel,
        **config,
        **{f"stride_pixels_{dim}": stride for dim, stride in zip("nhwc", pixels.stride(), strict=True)},
        enable_fp_fusion=True,
    )
    return x
