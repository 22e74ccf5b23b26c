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

MULTIPROCESSORS = 132  # of an H100 or H200; a constant, so that the order of a sum depends on no device
SHORT_LOOP = 4  # steps up to which memory is the limit, and more resident blocks serve it better than larger ones
MAX_SPLITS = 8
MIN_STEPS_PER_SPLIT = 6  # a split of fewer steps costs more than it hides


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
):
    """Sum the convolution from step ``first`` to ``last``, [BLOCK_M, BLOCK_OC] fp32.

    A step is one tap of the kernel, BLOCK_C channels wide.
    """
    chunks = tl.cdiv(C, BLOCK_C)
    range_c = tl.arange(0, BLOCK_C)
    # int64: an image may hold more than 2**31 elements, and so may the weights
    weight_ptrs = weight_ptr + offs_oc[None, :].to(tl.int64) * stride_weight_o + range_c[:, None]  # [BLOCK_C, BLOCK_OC]
    acc = tl.zeros((BLOCK_M, BLOCK_OC), dtype=tl.float32)
    for step in range(first, last):
        if KERNEL == 1:
            iy, ix, chunk, tap_offset = oy * STRIDE, ox * STRIDE, step, 0
            inside = mask_m
        else:
            tap = step // chunks
            chunk = step - tap * chunks
            ky = tap // KERNEL
            kx = tap - ky * KERNEL
            iy, ix = oy * STRIDE + ky - KERNEL // 2, ox * STRIDE + kx - KERNEL // 2
            inside = mask_m & (iy >= 0) & (iy < IH) & (ix >= 0) & (ix < IW)  # elsewhere is the padding: zeros
            tap_offset = ky * stride_weight_h + kx * stride_weight_w
        offs_c = chunk * BLOCK_C + range_c  # [BLOCK_C]
        mask_c = offs_c < C
        x_rows = iy.to(tl.int64) * stride_x_h + ix.to(tl.int64) * stride_x_w  # [BLOCK_M]
        x = tl.load(x_ptr + x_rows[:, None] + offs_c[None, :], mask=inside[:, None] & mask_c[None, :], other=0.0)
        mask_w = mask_c[:, None] & (offs_oc < OC)[None, :]
        w = tl.load(weight_ptrs + (tap_offset + chunk * BLOCK_C), mask=mask_w, other=0.0)  # [BLOCK_C, BLOCK_OC]
        acc = dot(x, w, acc)  # x is [BLOCK_M, BLOCK_C]
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
    """Load the tile's residual, [BLOCK_M, BLOCK_OC] fp32."""
    rows = n * stride_residual_n + oy.to(tl.int64) * stride_residual_h + ox.to(tl.int64) * stride_residual_w
    return tl.load(residual_ptr + rows[:, None] + offs_oc[None, :], mask=mask, other=0.0).to(tl.float32)


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
):
    """Compute one tile of an image's output, or one split's partial sums.

    grid = (N * tiles_m * cdiv(OC, BLOCK_OC), SPLITS).
    """
    n, _, offs_m, offs_oc = tile_of(tl.program_id(0), pixels, tiles_m, OC, BLOCK_M, BLOCK_OC)
    mask_m = offs_m < pixels
    oy = offs_m // OW
    ox = offs_m - oy * OW
    mask = mask_m[:, None] & (offs_oc < OC)[None, :]

    steps = KERNEL * KERNEL * tl.cdiv(C, BLOCK_C)
    first, last = 0, steps
    if SPLITS > 1:
        steps_per_split = tl.cdiv(steps, SPLITS)
        first = tl.program_id(1) * steps_per_split
        last = tl.minimum(first + steps_per_split, steps)
        out_ptr += tl.program_id(1).to(tl.int64) * rows * OC
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
    )
    if SPLITS == 1:
        acc = scale_and_shift(acc, scale_ptr, shift_ptr, offs_oc, OC)
        if HAS_RESIDUAL:
            acc += residual_tile(
                residual_ptr, n, oy, ox, offs_oc, mask, stride_residual_n, stride_residual_h, stride_residual_w
            )
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
        oy = offs_m // OW
        ox = offs_m - oy * OW
        z += residual_tile(
            residual_ptr, n, oy, ox, offs_oc, mask, stride_residual_n, stride_residual_h, stride_residual_w
        )
    tl.store(out_ptr + offsets, _activated(z, ACTIVATION).to(out_ptr.dtype.element_ty), mask=mask)


def block_sizes(pixels, c, oc, kernel, itemsize, device):
    """Choose tile and warps of a convolution from one image's sizes: batching must change no bit.

    Before Hopper, a product's operands are in registers too: with four warps, the 128 x 64 tile of a 1 x 1 convolution
    with a residual would spill, so it gets eight.
    """
    block_m, block_oc = 128, min(128, max(16, tuning.bucket(oc)))
    if itemsize == 4:  # no matrix instructions: a smaller tile of sums in registers
        return {"BLOCK_M": 64, "BLOCK_OC": min(64, block_oc), "BLOCK_C": 16, "num_warps": 4, "num_stages": 3}
    block_c = min(64, max(16, tuning.bucket(c)))
    steps = _steps(c, kernel, block_c)
    if steps <= SHORT_LOOP or _tiles(pixels, oc, block_m, block_oc) < MULTIPROCESSORS:
        block_oc = min(64, block_oc)
    if _tiles(pixels, oc, block_m, block_oc) < MULTIPROCESSORS:
        block_m = 64
    before_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9
    four_warps = 4096 if kernel == 1 and before_hopper else 8192  # elements of a tile that four warps hold
    return {
        "BLOCK_M": block_m,
        "BLOCK_OC": block_oc,
        "BLOCK_C": block_c,
        "num_warps": 8 if block_m * block_oc > four_warps else 4,
        "num_stages": 2 if torch.version.hip else max(2, min(4, steps)),
    }


def _steps(c, kernel, block_c):
    return kernel * kernel * triton.cdiv(c, block_c)


def _tiles(pixels, oc, block_m, block_oc):
    return triton.cdiv(pixels, block_m) * triton.cdiv(oc, block_oc)


def _splits(pixels, c, oc, kernel, blocks):
    """Count the splits of the sums, where an image's tiles alone leave multiprocessors idle."""
    tiles = _tiles(pixels, oc, blocks["BLOCK_M"], blocks["BLOCK_OC"])
    wanted = min(MAX_SPLITS, 2 * MULTIPROCESSORS // tiles, _steps(c, kernel, blocks["BLOCK_C"]) // MIN_STEPS_PER_SPLIT)
    return 1 if wanted < 2 else 1 << (wanted.bit_length() - 1)


def with_channels_last(x):
    """Return [N, H, W, C] with contiguous channels; None stays None."""
    return x if x is None or x.stride(3) == 1 else x.contiguous()


def weight_channels_last(weight):
    """Return [OC, C, K, K] with contiguous C; weights kept in that memory format need no copy."""
    return weight if weight.stride(1) == 1 else weight.contiguous(memory_format=torch.channels_last)


def strides_of(name, *strides, dims="nhw"):
    """Return the keyword arguments ``stride_<name>_<dim>``."""
    return {f"stride_{name}_{dim}": stride for dim, stride in zip(dims, strides, strict=True)}


def tuning_key(mode, pixels, c, oc, kernel, stride, dtype):
    """Name what a tuned configuration depends on: bucketed sizes, kernel, stride and dtype."""
    sizes = f"px{tuning.bucket(pixels)}-c{tuning.bucket(c)}-oc{tuning.bucket(oc)}"
    return f"{mode}-k{kernel}s{stride}-{sizes}-{str(dtype).removeprefix('torch.')}"


def _launch_epilogue(y, out, scale, shift, residual, activation, splits, block_oc):
    """Add up ``y``, [splits, N, OH, OW, OC], and apply the epilogue; ``y`` may be ``out`` itself."""
    n, oh, ow, oc = out.shape
    pixels = oh * ow
    tiles_m = triton.cdiv(pixels, 32)
    _conv_norm_act_reduce_kernel[(n * tiles_m * triton.cdiv(oc, block_oc),)](
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
        BLOCK_M=32,
        BLOCK_OC=block_oc,
        SPLITS=splits,
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

    blocks = block_sizes(pixels, c, oc, kernel, x.element_size(), x.device)
    blocks["SPLITS"] = _splits(pixels, c, oc, kernel, blocks)
    key = tuning_key("fwd", pixels, c, oc, kernel, stride, x.dtype)
    config = tuning.pick("conv_norm_act", key, x.device, blocks)
    splits, block_oc = config["SPLITS"], config["BLOCK_OC"]
    target = out if splits == 1 else torch.empty((splits, n, oh, ow, oc), dtype=torch.float32, device=x.device)
    scale, shift = scale.contiguous(), shift.contiguous()
    options = {
        "ACTIVATION": activation,
        "HAS_RESIDUAL": residual is not None,
        "OW": ow,
        "pixels": pixels,
        "rows": n * pixels,
        "OC": oc,
        **strides_of("residual", *((0, 0, 0) if residual is None else residual.stride()[:3])),
    }
    tiles_m = triton.cdiv(pixels, config["BLOCK_M"])
    _conv_norm_act_fwd_kernel[(n * tiles_m * triton.cdiv(oc, block_oc), splits)](
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
        **options,
        **strides_of("x", *x.stride()[:3]),
        **strides_of("weight", weight.stride(0), *weight.stride()[2:], dims="ohw"),
        **config,
    )
    if splits > 1:
        _launch_epilogue(target, out, scale, shift, residual, activation, splits, block_oc)
    return out
