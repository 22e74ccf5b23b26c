"""Triton backward of ``stem``: everything but the convolution's own two gradients, which are PyTorch's (cuDNN)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.cudnn import convolution_backward
from ...core.tuning import cdiv
from .triton_fwd import convolve
from .triton_pack import half, pixel_kind, rounded


@triton.jit
def _pixel_rows(pid, tiles, size, IW, BLOCK: tl.constexpr):
    """Return image, pixel numbers [BLOCK] in it, their rows, columns and mask."""
    n = (pid // tiles).to(tl.int64)
    offs = pid % tiles * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    iy = offs // IW
    return n, offs, iy, offs - iy * IW, offs < size


@triton.jit
def _windowed(pixels_ptrs, mask, window_ptr, n, PIXELS: tl.constexpr):
    """Return pixels in units of their window, and its width."""
    p = tl.load(pixels_ptrs, mask=mask, other=0)
    if PIXELS == "uint16":  # passed as int16
        p = p.to(tl.int32) & 0xFFFF
    low, high = tl.load(window_ptr + 2 * n), tl.load(window_ptr + 2 * n + 1)
    width = tl.zeros(p.shape, dtype=tl.float32) + (high - low)
    return tl.div_rn(p.to(tl.float32) - low, width), width


@triton.jit(do_not_specialize=["IW", "size", "tiles", "stride_pixels_n"])
def _stem_normalise_kernel(
    pixels_ptr,  # [N, IH, IW, CP]
    window_ptr,  # [N, 2] fp32
    mean_ptr,  # [3] fp32
    std_ptr,  # [3] fp32
    x_ptr,  # [N, IH, IW, 3]
    IW,
    size,  # IH * IW
    tiles,
    stride_pixels_n,
    stride_pixels_h,
    stride_pixels_w,
    stride_pixels_c,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise the pixels that the convolution reads; grid = (N * tiles,). A grey image's stride_pixels_c is 0."""
    n, offs, iy, ix, inside = _pixel_rows(tl.program_id(0), tiles, size, IW, BLOCK)
    channels = tl.arange(0, 4)[None, :]
    mask = inside[:, None] & (channels < 3)  # [BLOCK, 4]
    along = n * stride_pixels_n + iy.to(tl.int64) * stride_pixels_h + ix.to(tl.int64) * stride_pixels_w
    pixels_ptrs = pixels_ptr + along[:, None] + channels.to(tl.int64) * stride_pixels_c
    p, _ = _windowed(pixels_ptrs, mask, window_ptr, n, PIXELS)  # [BLOCK, 4]
    p = tl.clamp(p, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    mean = tl.load(mean_ptr + channels, mask=channels < 3, other=0.0)  # [1, 4]
    std = tl.load(std_ptr + channels, mask=channels < 3, other=1.0)
    x = tl.div_rn(p - mean, tl.broadcast_to(std, p.shape))
    tl.store(x_ptr + (n * size + offs)[:, None] * 3 + channels, rounded(x, x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["IW", "size", "tiles", "stride_pixels_n"])
def _stem_dpixels_kernel(
    dx_ptr,  # [N, IH, IW, 3]
    pixels_ptr,  # [N, IH, IW, CP]
    window_ptr,  # [N, 2] fp32
    std_ptr,  # [3] fp32
    dpixels_ptr,  # [N, IH, IW, CP]
    IW,
    size,  # IH * IW
    tiles,
    stride_pixels_n,
    stride_pixels_h,
    stride_pixels_w,
    stride_pixels_c,
    CP: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Differentiate normalisation and window, which passes no gradient outside; grid = (N * tiles,)."""
    n, offs, iy, ix, inside = _pixel_rows(tl.program_id(0), tiles, size, IW, BLOCK)
    channels = tl.arange(0, 4)[None, :]
    mask = inside[:, None] & (channels < 3)  # [BLOCK, 4]
    along = n * stride_pixels_n + iy.to(tl.int64) * stride_pixels_h + ix.to(tl.int64) * stride_pixels_w
    dx = tl.load(dx_ptr + (n * size + offs)[:, None] * 3 + channels, mask=mask, other=0.0).to(tl.float32)
    std = tl.load(std_ptr + channels, mask=channels < 3, other=1.0)  # [1, 4]
    dp = dx / std  # [BLOCK, 4]
    if CP == 1:
        p, width = _windowed(pixels_ptr + along, inside, window_ptr, n, PIXELS)  # [BLOCK]
        dp = tl.where((p >= 0) & (p <= 1), tl.sum(dp, axis=1) / width, 0.0)
        tl.store(dpixels_ptr + n * size + offs, rounded(dp, dpixels_ptr.dtype.element_ty), mask=inside)
    else:
        pixels_ptrs = pixels_ptr + along[:, None] + channels.to(tl.int64) * stride_pixels_c
        p, width = _windowed(pixels_ptrs, mask, window_ptr, n, PIXELS)  # [BLOCK, 4]
        dp = tl.where((p >= 0) & (p <= 1), dp / width, 0.0)
        dpixels_ptrs = dpixels_ptr + (n * size + offs)[:, None] * 3 + channels
        tl.store(dpixels_ptrs, rounded(dp, dpixels_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pool_winner(dout_ptr, y_ptr, n, p, q, offs_oc, mask_oc, scale, shift, OH, OW, PH, PW, OC):
    """Return the gradient of pooled pixel (p, q) and which of its nine gets it: the first largest above zero, or -1."""
    mask = ((p < PH) & (q < PW))[:, None] & mask_oc
    pooled_ptrs = dout_ptr + ((n * PH + p) * PW + q)[:, None] * OC + offs_oc[None, :]
    dout = tl.load(pooled_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK, BLOCK_OC]
    best = tl.zeros_like(dout)
    winner = tl.full(dout.shape, -1, dtype=tl.int32)
    for place in tl.static_range(9):
        y, x = 2 * p - 1 + place // 3, 2 * q - 1 + place % 3  # [BLOCK]
        inside = ((y >= 0) & (y < OH) & (x >= 0) & (x < OW))[:, None] & mask
        y_ptrs = y_ptr + ((n * OH + y) * OW + x)[:, None] * OC + offs_oc[None, :]
        z = tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32) * scale + shift  # [BLOCK, BLOCK_OC]
        larger = inside & (z > best)
        best = tl.where(larger, z, best)
        winner = tl.where(larger, place, winner)
    return dout, winner


@triton.jit
def _store_dy(dz, y_ptr, dy_ptr, n, y, x, offs_oc, mask_oc, scale, OH, OW, OC, HAS_DY: tl.constexpr):
    """Store the gradient at the convolution's output and return a tile's sums of dz * y and of dz, [BLOCK_OC]."""
    mask = ((y < OH) & (x < OW))[:, None] & mask_oc
    offsets = ((n * OH + y) * OW + x)[:, None] * OC + offs_oc[None, :]  # [BLOCK, BLOCK_OC] int64
    if HAS_DY:
        tl.store(dy_ptr + offsets, rounded(dz * scale, dy_ptr.dtype.element_ty), mask=mask)
    conv = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(tl.where(mask, dz * conv, 0.0), axis=0), tl.sum(tl.where(mask, dz, 0.0), axis=0)


@triton.jit(do_not_specialize=["OH", "OW", "PH", "PW", "size", "tiles", "programs"])
def _stem_bwd_kernel(
    dout_ptr,  # [N, PH, PW, OC] contiguous
    y_ptr,  # [N, OH, OW, OC], the convolution
    scale_ptr,  # [OC] fp32
    shift_ptr,  # [OC] fp32
    dy_ptr,  # [N, OH, OW, OC], only with HAS_DY
    sums_ptr,  # [2, N * tiles, OC] fp32: of dz * y, of dz
    OH,
    OW,
    PH,
    PW,
    OC,
    size,  # PH * PW
    tiles,
    programs,  # N * tiles
    POOL: tl.constexpr,
    HAS_DY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OC: tl.constexpr,
):
    """Differentiate pool, ReLU and norm; grid = (N * tiles, cdiv(OC, BLOCK_OC)).

    With the pool, pooled pixel (p, q) writes the convolution's pixels (2p, 2q) to (2p + 1, 2q + 1), which its own
    window and the three after it cover: no element is added to by two programs.
    """
    n, offs, p, q, inside = _pixel_rows(tl.program_id(0), tiles, size, PW, BLOCK)
    offs_oc = tl.program_id(1) * BLOCK_OC + tl.arange(0, BLOCK_OC)  # [BLOCK_OC]
    columns = offs_oc < OC
    mask_oc = columns[None, :]
    scale = tl.load(scale_ptr + offs_oc, mask=columns, other=0.0)[None, :]  # [1, BLOCK_OC]
    shift = tl.load(shift_ptr + offs_oc, mask=columns, other=0.0)[None, :]
    dscale = tl.zeros((BLOCK_OC,), dtype=tl.float32)
    dshift = tl.zeros((BLOCK_OC,), dtype=tl.float32)
    p = tl.where(inside, p, PH)  # past the last tile: outside everything

    if POOL == 3:
        windows = (  # gradient, winner
            _pool_winner(dout_ptr, y_ptr, n, p, q, offs_oc, mask_oc, scale, shift, OH, OW, PH, PW, OC),
            _pool_winner(dout_ptr, y_ptr, n, p, q + 1, offs_oc, mask_oc, scale, shift, OH, OW, PH, PW, OC),
            _pool_winner(dout_ptr, y_ptr, n, p + 1, q, offs_oc, mask_oc, scale, shift, OH, OW, PH, PW, OC),
            _pool_winner(dout_ptr, y_ptr, n, p + 1, q + 1, offs_oc, mask_oc, scale, shift, OH, OW, PH, PW, OC),
        )
        for pixel in tl.static_range(4):
            dz = tl.zeros((BLOCK, BLOCK_OC), dtype=tl.float32)
            for down in tl.static_range(pixel // 2 + 1):
                for right in tl.static_range(pixel % 2 + 1):
                    dout, winner = windows[2 * down + right]
                    place = (pixel // 2 - 2 * down + 1) * 3 + pixel % 2 - 2 * right + 1  # in that window
                    dz += tl.where(winner == place, dout, 0.0)
            of_y, of_one = _store_dy(
                dz, y_ptr, dy_ptr, n, 2 * p + pixel // 2, 2 * q + pixel % 2, offs_oc, mask_oc, scale, OH, OW, OC, HAS_DY
            )
            dscale += of_y
            dshift += of_one
    else:
        mask = inside[:, None] & mask_oc
        offsets = (n * size + offs)[:, None] * OC + offs_oc[None, :]  # [BLOCK, BLOCK_OC] int64
        z = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * scale + shift
        dz = tl.load(dout_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dz = tl.where(z > 0, dz, 0.0)
        dscale, dshift = _store_dy(dz, y_ptr, dy_ptr, n, p, q, offs_oc, mask_oc, scale, OH, OW, OC, HAS_DY)
    sums_ptrs = sums_ptr + tl.program_id(0).to(tl.int64) * OC + offs_oc  # [BLOCK_OC]
    tl.store(sums_ptrs, dscale, mask=columns)
    tl.store(sums_ptrs + tl.cast(programs, tl.int64) * OC, dshift, mask=columns)


def _pixel_strides(pixels):
    """Return the stride arguments of a kernel over pixels [N, IH, IW, C]; a grey image's channel stride is 0."""
    names = ("stride_pixels_n", "stride_pixels_h", "stride_pixels_w", "stride_pixels_c")
    return dict(zip(names, (*pixels.stride()[:3], 0 if pixels.shape[3] == 1 else pixels.stride(3)), strict=True))


def _pixelwise_launch(pixels, channels):
    """Return grid and options of the two kernels that are elementwise in pixels."""
    n, ih, iw, _ = pixels.shape
    key = f"pixels-c{channels}-px{tuning.bucket(ih * iw)}"
    config = tuning.pick("stem", key, pixels.device, {"BLOCK": 256, "num_warps": 4})
    tiles = cdiv(ih * iw, config["BLOCK"])
    return (n * tiles,), {"IW": iw, "size": ih * iw, "tiles": tiles, **_pixel_strides(pixels), **config}


def _normalised(pixels, window, mean, std, dtype):
    """Return the normalised pixels, [N, IH, IW, 3]."""
    pixels, kind = pixel_kind(pixels)
    x = torch.empty((*pixels.shape[:3], 3), dtype=dtype, device=pixels.device)
    grid, options = _pixelwise_launch(pixels, 3)
    _stem_normalise_kernel[grid](
        pixels_ptr=pixels,
        window_ptr=window,
        mean_ptr=mean,
        std_ptr=std,
        x_ptr=x,
        PIXELS=kind,
        **options,
        enable_fp_fusion=True,
    )
    return x


def _dpixels(dx, pixels, window, std):
    """Return the gradient of the pixels, [N, IH, IW, CP]."""
    dpixels = torch.empty(pixels.shape, dtype=pixels.dtype, device=pixels.device)
    channels = pixels.shape[3]
    grid, options = _pixelwise_launch(pixels, channels)
    _stem_dpixels_kernel[grid](
        dx_ptr=dx,
        pixels_ptr=pixels,
        window_ptr=window,
        std_ptr=std,
        dpixels_ptr=dpixels,
        CP=channels,
        PIXELS="float",
        **options,
        enable_fp_fusion=True,
    )
    return dpixels


def _epilogue_bwd(dout, y, scale, shift, pool, has_dy):
    """Return dy or None, and the sums [OC] of dz * y and of dz."""
    n, oh, ow, oc = y.shape
    ph, pw = (half(oh), half(ow)) if pool == 3 else (oh, ow)
    block_oc = min(64, max(16, tuning.bucket(oc)))
    key = f"bwd-pool{pool}-px{tuning.bucket(ph * pw)}-{str(y.dtype).removeprefix('torch.')}"
    config = tuning.pick("stem", key, y.device, {"BLOCK": 16, "num_warps": 4})
    tiles = cdiv(ph * pw, config["BLOCK"])
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device) if has_dy else None
    sums = torch.empty((2, n * tiles, oc), dtype=torch.float32, device=y.device)
    _stem_bwd_kernel[(n * tiles, cdiv(oc, block_oc))](
        dout_ptr=dout,
        y_ptr=y,
        scale_ptr=scale.contiguous(),
        shift_ptr=shift.contiguous(),
        dy_ptr=dy,
        sums_ptr=sums,
        OH=oh,
        OW=ow,
        PH=ph,
        PW=pw,
        OC=oc,
        size=ph * pw,
        tiles=tiles,
        programs=n * tiles,
        POOL=pool,
        HAS_DY=has_dy,
        BLOCK_OC=block_oc,
        **config,
        enable_fp_fusion=True,
    )
    # second stage of the reduction; PyTorch's sum has one order. Two tensors: results of an op must not share memory
    return dy, (sums[0].sum(0), sums[1].sum(0))


def stem_bwd(dout, pixels, window, mean, std, weight, scale, shift, pool, output_mask, out=None):
    """Return the gradients of pixels, weight, scale, shift; those not in ``output_mask`` are empty.

    ``out`` is not read.
    """
    if dout.numel() == 0:
        like = (pixels, weight, scale, shift)
        return tuple(t.new_zeros(t.shape) if m else weight.new_empty(0) for t, m in zip(like, output_mask, strict=True))
    window, mean, std = window.contiguous(), mean.contiguous(), std.contiguous()
    # grey as three channels, rounded like the reference's: weights summed first would decide other near ties
    y = convolve(pixels.expand(*pixels.shape[:3], 3), window, mean, std, weight, None, 1)
    has_dy = output_mask[0] or output_mask[1]
    dy, (dscale, dshift) = _epilogue_bwd(dout.contiguous(), y, scale, shift, pool, has_dy)
    dpixels, dweight = None, None
    if has_dy:
        x = _normalised(pixels, window, mean, std, weight.dtype)
        dx, dweight = convolution_backward(dy, x, weight, 2, output_mask[:2])
        dpixels = _dpixels(dx, pixels, window, std) if output_mask[0] else None
    wanted = zip((dpixels, dweight, dscale, dshift), output_mask, strict=True)
    return tuple(grad.contiguous() if m else weight.new_empty(0) for grad, m in wanted)
