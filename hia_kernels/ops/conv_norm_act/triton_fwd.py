"""Triton forward of ``conv_norm_act``: an implicit GEMM with norm, residual and activation in its epilogue.

Implicit GEMM (Chetlur et al. 2014, section 3): the matrix of windows is never stored, its tiles are gathered from the
channels-last image as the product needs them. Where an image has too few tiles, the sum over taps and channels is
split (split-K) and a second kernel adds the partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.triton_math import dot
from ...core.tuning import cdiv
from .triton_tiles import MAX_SPLITS, block_sizes, is_even, tuning_key


@triton.jit
def tile_of(pid, pixels, tiles_m, OC, BLOCK_M: tl.constexpr, BLOCK_OC: tl.constexpr):
    """Locate a program: image, tile of its output pixels, pixels and channels.

    Tiles of channels are innermost, so that neighbouring programs share x in L2.
    """
    tiles_oc = tl.cdiv(OC, BLOCK_OC)
    image_tile = pid // tiles_oc
    n = (image_tile // tiles_m).to(tl.int64)  # int64: N * OH * OW * OC exceeds 2**31 at production sizes
    pid_m = image_tile % tiles_m
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], of one image
    offs_oc = (pid % tiles_oc) * BLOCK_OC + tl.arange(0, BLOCK_OC)  # [BLOCK_OC]
    return n, pid_m, offs_m, offs_oc


@triton.jit
def row_and_column(offs_m, OW, IS_FLAT: tl.constexpr):
    """Return oy and ox of output pixels, [BLOCK_M] each.

    Where the rows of a tensor lie end to end, it is one row of all its pixels, and nothing has to be divided.
    """
    oy = offs_m * 0 if IS_FLAT else offs_m // OW
    return oy, offs_m - oy * OW


@triton.jit
def taps_inside(iy, ix, mask_m, IH, IW, KERNEL: tl.constexpr):
    """Return the taps that see the image and not its padding, [BLOCK_M] int32: bit ky * KERNEL + kx.

    Args:
        iy, ix: the first tap's, [BLOCK_M].
        mask_m: [BLOCK_M].
    """
    columns = mask_m.to(tl.int32) * 0
    for kx in tl.static_range(KERNEL):
        columns |= (mask_m & (ix + kx >= 0) & (ix + kx < IW)).to(tl.int32) << kx
    taps = columns * 0
    for ky in tl.static_range(KERNEL):
        taps |= tl.where((iy + ky >= 0) & (iy + ky < IH), columns << (ky * KERNEL), 0)
    return taps


@triton.jit
def conv_tile(
    x_ptr,  # [IH, IW, C] of one image
    weight_ptr,  # [OC, C, K, K] with C contiguous
    oy,  # [BLOCK_M]
    ox,  # [BLOCK_M]
    mask_m,  # [BLOCK_M]
    offs_oc,  # [BLOCK_OC]
    first,
    last,
    IH,
    IW,
    C,
    OC,
    stride_x_h,
    stride_x_w,
    stride_weight_o,
    stride_weight_h,
    stride_weight_w,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_EVEN_C: tl.constexpr,
    IS_EVEN_OC: tl.constexpr,
    IN_L1: tl.constexpr,
):
    """Sum the convolution from step ``first`` to ``last``, [BLOCK_M, BLOCK_OC] fp32.

    A step is one tap of the kernel, BLOCK_C channels wide. Whatever depends on a pixel is computed ahead of the loop:
    a step adds one scalar to the pointers, and looks up one bit of each pixel's taps.
    """
    chunks = tl.cdiv(C, BLOCK_C)
    range_c = tl.arange(0, BLOCK_C)
    # int64: an image may hold more than 2**31 elements, and so may the weights
    weight_ptrs = weight_ptr + offs_oc[None, :].to(tl.int64) * stride_weight_o + range_c[:, None]  # [BLOCK_C, BLOCK_OC]
    iy, ix = oy * STRIDE - KERNEL // 2, ox * STRIDE - KERNEL // 2  # of the first tap; in the padding, they are negative
    x_rows = iy.to(tl.int64) * stride_x_h + ix.to(tl.int64) * stride_x_w  # [BLOCK_M]
    x_ptrs = x_ptr + x_rows[:, None] + range_c[None, :]  # [BLOCK_M, BLOCK_C]
    if KERNEL > 1:
        taps = taps_inside(iy, ix, mask_m, IH, IW, KERNEL)
        tap = first // chunks
        chunk = first - tap * chunks
    acc = tl.zeros((BLOCK_M, BLOCK_OC), dtype=tl.float32)
    for step in range(first, last):
        offset_c = (step if KERNEL == 1 else chunk) * BLOCK_C
        x_offset, weight_offset, inside = offset_c, offset_c, mask_m
        if KERNEL > 1:
            ky = tap // KERNEL
            kx = tap - ky * KERNEL
            x_offset = ky.to(tl.int64) * stride_x_h + kx.to(tl.int64) * stride_x_w + offset_c
            weight_offset = ky * stride_weight_h + kx * stride_weight_w + offset_c
            inside = (taps & (1 << tap)) != 0  # [BLOCK_M]
            chunk += 1  # counted, because a division a step costs more than all else
            tap += (chunk == chunks).to(tl.int32)
            chunk = tl.where(chunk == chunks, 0, chunk)
        mask_x, mask_w = inside[:, None], (offs_oc < OC)[None, :]
        if not IS_EVEN_C:
            mask_c = offset_c + range_c < C  # [BLOCK_C]
            mask_x, mask_w = mask_x & mask_c[None, :], mask_w & mask_c[:, None]
        x_now = x_ptrs + x_offset  # [BLOCK_M, BLOCK_C]
        if IN_L1:  # copies of 16 bytes pass L1 by, those of 8 leave the windows that overlap in it
            x_now = tl.max_contiguous(x_now, [1, 4])
        x = tl.load(x_now, mask=mask_x, other=0.0)  # [BLOCK_M, BLOCK_C]
        if IS_EVEN_C and IS_EVEN_OC:
            w = tl.load(weight_ptrs + weight_offset)  # [BLOCK_C, BLOCK_OC]
        else:
            w = tl.load(weight_ptrs + weight_offset, mask=mask_w, other=0.0)
        acc = dot(x, w, acc)
    return acc


@triton.jit
def gelu_cdf(z):
    """Return the standard normal distribution function at z."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def scale_and_shift(acc, scale_ptr, shift_ptr, offs_oc, OC):
    """Return scale * acc + shift, [BLOCK_M, BLOCK_OC] fp32."""
    scale = tl.load(scale_ptr + offs_oc, mask=offs_oc < OC, other=0.0)  # [BLOCK_OC]
    shift = tl.load(shift_ptr + offs_oc, mask=offs_oc < OC, other=0.0)  # [BLOCK_OC]
    return acc * scale[None, :] + shift[None, :]


@triton.jit
def residual_tile(residual_ptr, n, oy, ox, offs_oc, mask, stride_residual_n, stride_residual_h, stride_residual_w):
    """Load the tile's residual, [BLOCK_M, BLOCK_OC] in its dtype."""
    rows = n * stride_residual_n + oy.to(tl.int64) * stride_residual_h + ox.to(tl.int64) * stride_residual_w
    return tl.load(residual_ptr + rows[:, None] + offs_oc[None, :], mask=mask, other=0.0)


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "gelu":
        z = z * gelu_cdf(z)
    return z


@triton.jit(do_not_specialize=["IH", "IW", "OW", "pixels", "rows", "tiles_m"])
def _conv_norm_act_fwd_kernel(
    x_ptr,  # [N, IH, IW, C]
    weight_ptr,  # [OC, C, K, K] with C contiguous
    scale_ptr,  # [OC] fp32
    shift_ptr,  # [OC] fp32
    residual_ptr,  # [N, OH, OW, OC], only with HAS_RESIDUAL
    out_ptr,  # [N, OH, OW, OC]; with SPLITS > 1 [SPLITS, N, OH, OW, OC] fp32, partial sums
    IH,
    IW,
    OW,
    pixels,  # OH * OW
    rows,  # N * pixels
    tiles_m,
    C,
    OC,
    stride_x_n,
    stride_x_h,
    stride_x_w,
    stride_weight_o,
    stride_weight_h,
    stride_weight_w,
    stride_residual_n,
    stride_residual_h,
    stride_residual_w,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_EVEN_C: tl.constexpr,
    IS_EVEN_OC: tl.constexpr,
    IS_FLAT_X: tl.constexpr,
    IS_FLAT_RESIDUAL: tl.constexpr,
    IN_L1: tl.constexpr,
):
    """Compute one tile of an image's output, or one split's partial sums.

    grid = (N * tiles_m * cdiv(OC, BLOCK_OC), SPLITS).
    """
    n, _, offs_m, offs_oc = tile_of(tl.program_id(0), pixels, tiles_m, OC, BLOCK_M, BLOCK_OC)
    mask_m = offs_m < pixels
    oy, ox = row_and_column(offs_m, OW, IS_FLAT_X)
    mask = mask_m[:, None] & (offs_oc < OC)[None, :]

    steps = KERNEL * KERNEL * tl.cdiv(C, BLOCK_C)
    first, last = 0, steps
    if SPLITS > 1:
        steps_per_split = tl.cdiv(steps, SPLITS)
        first = tl.program_id(1) * steps_per_split
        last = tl.minimum(first + steps_per_split, steps)
        out_ptr += tl.program_id(1).to(tl.int64) * rows * OC
    if HAS_RESIDUAL and SPLITS == 1:  # asked for ahead of the loop, so that it arrives meanwhile
        row, column = row_and_column(offs_m, OW, IS_FLAT_RESIDUAL)
        residual = residual_tile(
            residual_ptr, n, row, column, offs_oc, mask, stride_residual_n, stride_residual_h, stride_residual_w
        )
    acc = conv_tile(
        x_ptr + n * stride_x_n,
        weight_ptr,
        oy,
        ox,
        mask_m,
        offs_oc,
        first,
        last,
        IH,
        IW,
        C,
        OC,
        stride_x_h,
        stride_x_w,
        stride_weight_o,
        stride_weight_h,
        stride_weight_w,
        KERNEL=KERNEL,
        STRIDE=STRIDE,
        BLOCK_M=BLOCK_M,
        BLOCK_OC=BLOCK_OC,
        BLOCK_C=BLOCK_C,
        IS_EVEN_C=IS_EVEN_C,
        IS_EVEN_OC=IS_EVEN_OC,
        IN_L1=IN_L1,
    )
    if SPLITS == 1:
        acc = scale_and_shift(acc, scale_ptr, shift_ptr, offs_oc, OC)
        if HAS_RESIDUAL:
            acc += residual.to(tl.float32)
        acc = _activated(acc, ACTIVATION)
    out_ptrs = out_ptr + (n * pixels + offs_m)[:, None] * OC + offs_oc[None, :]  # [BLOCK_M, BLOCK_OC]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["OW", "pixels", "rows", "tiles_m"])
def _conv_norm_act_reduce_kernel(
    partial_ptr,  # [SPLITS, N, OH, OW, OC] fp32; or out_ptr itself, another library's convolution in its dtype
    scale_ptr,  # [OC] fp32
    shift_ptr,  # [OC] fp32
    residual_ptr,  # [N, OH, OW, OC], only with HAS_RESIDUAL
    out_ptr,  # [N, OH, OW, OC]
    OW,
    pixels,  # OH * OW
    rows,  # N * pixels
    tiles_m,
    OC,
    stride_residual_n,
    stride_residual_h,
    stride_residual_w,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_FLAT_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OC: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Add the partial sums in their order, then norm, residual and activation.

    grid = (N * tiles_m * cdiv(OC, BLOCK_OC),).
    """
    n, _, offs_m, offs_oc = tile_of(tl.program_id(0), pixels, tiles_m, OC, BLOCK_M, BLOCK_OC)
    mask = (offs_m < pixels)[:, None] & (offs_oc < OC)[None, :]
    offsets = (n * pixels + offs_m)[:, None] * OC + offs_oc[None, :]  # [BLOCK_M, BLOCK_OC] int64

    acc = tl.zeros((BLOCK_M, BLOCK_OC), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        offs_split = tl.cast(rows, tl.int64) * split * OC
        acc += tl.load(partial_ptr + offs_split + offsets, mask=mask, other=0.0).to(tl.float32)
    z = scale_and_shift(acc, scale_ptr, shift_ptr, offs_oc, OC)
    if HAS_RESIDUAL:
        oy, ox = row_and_column(offs_m, OW, IS_FLAT_RESIDUAL)
        residual = residual_tile(
            residual_ptr, n, oy, ox, offs_oc, mask, stride_residual_n, stride_residual_h, stride_residual_w
        )
        z += residual.to(tl.float32)
    tl.store(out_ptr + offsets, _activated(z, ACTIVATION).to(out_ptr.dtype.element_ty), mask=mask)


def with_channels_last(x):
    """Return [N, H, W, C] with contiguous channels; None stays None."""
    return x if x is None or x.stride(3) == 1 else x.contiguous()


def weight_channels_last(weight):
    """Return [OC, C, K, K] with contiguous C; weights kept in that memory format need no copy."""
    return weight if weight.stride(1) == 1 else weight.contiguous(memory_format=torch.channels_last)


def strides_of(name, *strides, dims="nhw"):
    """Return the keyword arguments ``stride_<name>_<dim>``."""
    return {f"stride_{name}_{dim}": stride for dim, stride in zip(dims, strides, strict=True)}


def is_flat(x):
    """Tell whether the rows of each image [N, H, W, C] lie end to end."""
    return x.stride(1) == x.shape[2] * x.stride(2)


def _launch_epilogue(y, out, scale, shift, residual, activation, splits, block_oc):
    """Add up ``y``, [splits, N, OH, OW, OC], and apply the epilogue; ``y`` may be ``out`` itself."""
    n, oh, ow, oc = out.shape
    pixels = oh * ow
    tiles_m = cdiv(pixels, 32)
    _conv_norm_act_reduce_kernel[(n * tiles_m * cdiv(oc, block_oc),)](
        partial_ptr=y,
        scale_ptr=scale.contiguous(),
        shift_ptr=shift.contiguous(),
        residual_ptr=residual,
        out_ptr=out,
        OW=ow,
        pixels=pixels,
        rows=n * pixels,
        tiles_m=tiles_m,
        OC=oc,
        **strides_of("residual", *((0, 0, 0) if residual is None else residual.stride()[:3])),
        ACTIVATION=activation,
        HAS_RESIDUAL=residual is not None,
        IS_FLAT_RESIDUAL=residual is None or is_flat(residual),
        BLOCK_M=32,
        BLOCK_OC=block_oc,
        SPLITS=splits,
        enable_fp_fusion=True,
    )
    return out


def epilogue(y, scale, shift, residual, activation):
    """Apply norm, residual and activation to another library's convolution [N, OH, OW, OC], contiguous, in place."""
    block_oc = min(128, max(16, tuning.bucket(y.shape[3])))
    return _launch_epilogue(y, y, scale, shift, with_channels_last(residual), activation, 1, block_oc)


def conv_norm_act_fwd(x, weight, scale, shift, residual, stride, activation):
    """Return [N, OH, OW, OC], dtype of ``x``."""
    x, residual, weight = with_channels_last(x), with_channels_last(residual), weight_channels_last(weight)
    n, ih, iw, c = x.shape
    oc, kernel = weight.shape[0], weight.shape[2]
    oh, ow = (ih - 1) // stride + 1, (iw - 1) // stride + 1
    pixels = oh * ow
    out = torch.empty((n, oh, ow, oc), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out

    narrow = residual is not None or activation == "gelu"
    blocks = block_sizes(pixels, c, oc, kernel, x.element_size(), x.device, max_splits=MAX_SPLITS, narrow=narrow)
    blocks["IN_L1"] = 0
    key = tuning_key("fwd", pixels, c, oc, kernel, stride, x.dtype)
    config = tuning.pick("conv_norm_act", key, x.device, blocks)
    splits, block_oc = config["SPLITS"], config["BLOCK_OC"]
    target = out if splits == 1 else torch.empty((splits, n, oh, ow, oc), dtype=torch.float32, device=x.device)
    scale, shift = scale.contiguous(), shift.contiguous()
    options = {
        "ACTIVATION": activation,
        "HAS_RESIDUAL": residual is not None,
        "IS_FLAT_RESIDUAL": residual is None or is_flat(residual),
        "OW": ow,
        "pixels": pixels,
        "rows": n * pixels,
        "OC": oc,
        **strides_of("residual", *((0, 0, 0) if residual is None else residual.stride()[:3])),
    }
    tiles_m = cdiv(pixels, config["BLOCK_M"])
    _conv_norm_act_fwd_kernel[(n * tiles_m * cdiv(oc, block_oc), splits)](
        x_ptr=x,
        weight_ptr=weight,
        scale_ptr=scale,
        shift_ptr=shift,
        residual_ptr=residual,
        out_ptr=target,
        IH=ih,
        IW=iw,
        C=c,
        tiles_m=tiles_m,
        KERNEL=kernel,
        STRIDE=stride,
        IS_FLAT_X=kernel == 1 and stride == 1 and is_flat(x),
        **is_even(c, oc, config),
        **options,
        **strides_of("x", *x.stride()[:3]),
        **strides_of("weight", weight.stride(0), *weight.stride()[2:], dims="ohw"),
        **config,
        enable_fp_fusion=True,
    )
    if splits > 1:
        # narrow blocks: few programs are left of a convolution that had to be split
        _launch_epilogue(target, out, scale, shift, residual, activation, splits, min(64, block_oc))
    return out
