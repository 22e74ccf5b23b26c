"""Triton backward of ``conv_norm_act``: one kernel for the epilogue, which recomputes the convolution if needed.

The convolution's own two gradients are PyTorch's (cuDNN on CUDA).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.cudnn import convolution_backward
from ...core.tuning import cdiv
from .triton_fwd import (
    conv_tile,
    gelu_cdf,
    residual_tile,
    scale_and_shift,
    strides_of,
    tile_of,
    weight_channels_last,
    with_channels_last,
)
from .triton_tiles import block_sizes, is_even, tuning_key


@triton.jit(do_not_specialize=["IH", "IW", "OW", "pixels", "tiles_m"])
def _conv_norm_act_bwd_kernel(
    dout_ptr,  # [N, OH, OW, OC] contiguous
    x_ptr,  # [N, IH, IW, C]
    weight_ptr,  # [OC, C, K, K] with C contiguous
    scale_ptr,  # [OC] fp32
    shift_ptr,  # [OC] fp32
    residual_ptr,  # [N, OH, OW, OC], only with HAS_RESIDUAL
    out_ptr,  # [N, OH, OW, OC] contiguous
    dy_ptr,  # [N, OH, OW, OC], only with HAS_DY
    dresidual_ptr,  # [N, OH, OW, OC], only with HAS_DRESIDUAL
    dscale_ptr,  # [N * tiles_m, OC] fp32, only with HAS_DSCALE
    dshift_ptr,  # [N * tiles_m, OC] fp32, only with HAS_DSHIFT
    IH,
    IW,
    OW,
    pixels,  # OH * OW
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
    HAS_DY: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    HAS_DSCALE: tl.constexpr,
    HAS_DSHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_EVEN_C: tl.constexpr,
    IS_EVEN_OC: tl.constexpr,
):
    """Compute the gradient at the convolution's output and a tile's partial sums per channel.

    The grid is the forward's.
    """
    n, pid_m, offs_m, offs_oc = tile_of(tl.program_id(0), pixels, tiles_m, OC, BLOCK_M, BLOCK_OC)
    mask_m, mask_oc = offs_m < pixels, offs_oc < OC
    mask = mask_m[:, None] & mask_oc[None, :]
    offsets = (n * pixels + offs_m)[:, None] * OC + offs_oc[None, :]  # [BLOCK_M, BLOCK_OC] int64

    y = tl.zeros((BLOCK_M, BLOCK_OC), dtype=tl.float32)
    if HAS_DSCALE or ACTIVATION == "gelu":
        oy = offs_m // OW
        ox = offs_m - oy * OW
        y = conv_tile(
            x_ptr + n * stride_x_n,
            weight_ptr,
            oy,
            ox,
            mask_m,
            offs_oc,
            0,
            KERNEL * KERNEL * tl.cdiv(C, BLOCK_C),
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
            IN_L1=False,
        )
    dz = tl.load(dout_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_OC]
    if ACTIVATION == "relu":
        out = tl.load(out_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_OC]
        dz = tl.where(out > 0, dz, 0.0)
    if ACTIVATION == "gelu":
        z = scale_and_shift(y, scale_ptr, shift_ptr, offs_oc, OC)
        if HAS_RESIDUAL:
            residual = residual_tile(
                residual_ptr, n, oy, ox, offs_oc, mask, stride_residual_n, stride_residual_h, stride_residual_w
            )
            z += residual.to(tl.float32)
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327  # the standard normal's
        dz = tl.where(mask, dz * (gelu_cdf(z) + z * density), 0.0)

    if HAS_DY:
        scale = tl.load(scale_ptr + offs_oc, mask=mask_oc, other=0.0)  # [BLOCK_OC]
        tl.store(dy_ptr + offsets, (dz * scale[None, :]).to(dy_ptr.dtype.element_ty), mask=mask)
    if HAS_DRESIDUAL:
        tl.store(dresidual_ptr + offsets, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
    sums = (n * tiles_m + pid_m) * OC + offs_oc  # [BLOCK_OC] int64
    if HAS_DSCALE:
        tl.store(dscale_ptr + sums, tl.sum(dz * y, axis=0), mask=mask_oc)
    if HAS_DSHIFT:
        tl.store(dshift_ptr + sums, tl.sum(dz, axis=0), mask=mask_oc)


def _epilogue_bwd(dout, x, weight, scale, shift, residual, out, stride, activation, output_mask):
    """Return dy, dscale, dshift, dresidual; None where ``output_mask`` wants none."""
    n, ih, iw, c = x.shape
    oc, kernel = weight.shape[0], weight.shape[2]
    pixels = out.shape[1] * out.shape[2]
    heuristic = {"BLOCK_M": 32, "BLOCK_OC": min(128, max(16, tuning.bucket(oc))), "BLOCK_C": 16, "num_warps": 4}
    mode = "bwd"
    if output_mask[2] or activation == "gelu":
        heuristic = block_sizes(pixels, c, oc, kernel, x.element_size(), x.device)
        block_oc = min(64, heuristic["BLOCK_OC"])  # dout, out and y together: each has half the forward's registers
        del heuristic["SPLITS"]
        heuristic |= {"BLOCK_OC": block_oc, "num_warps": 8 if heuristic["BLOCK_M"] * block_oc > 4096 else 4}
        mode = "bwd-y"
    key = tuning_key(mode, pixels, c, oc, kernel, stride, x.dtype)
    config = tuning.pick("conv_norm_act", key, x.device, heuristic)
    tiles_m = cdiv(pixels, config["BLOCK_M"])

    wanted = [output_mask[0] or output_mask[1], output_mask[4], output_mask[2], output_mask[3]]
    like = [(out.shape, x.dtype)] * 2 + [((n * tiles_m, oc), torch.float32)] * 2
    dy, dresidual, dscale, dshift = (
        torch.empty(shape, dtype=dtype, device=x.device) if want else None
        for want, (shape, dtype) in zip(wanted, like, strict=True)
    )
    flags = dict(zip(("HAS_DY", "HAS_DRESIDUAL", "HAS_DSCALE", "HAS_DSHIFT"), wanted, strict=True))
    _conv_norm_act_bwd_kernel[(n * tiles_m * cdiv(oc, config["BLOCK_OC"]),)](
        dout_ptr=dout,
        x_ptr=x,
        weight_ptr=weight,
        scale_ptr=scale.contiguous(),
        shift_ptr=shift.contiguous(),
        residual_ptr=residual,
        out_ptr=out,
        dy_ptr=dy,
        dresidual_ptr=dresidual,
        dscale_ptr=dscale,
        dshift_ptr=dshift,
        IH=ih,
        IW=iw,
        OW=out.shape[2],
        pixels=pixels,
        tiles_m=tiles_m,
        C=c,
        OC=oc,
        **strides_of("x", *x.stride()[:3]),
        **strides_of("weight", weight.stride(0), *weight.stride()[2:], dims="ohw"),
        **strides_of("residual", *((0, 0, 0) if residual is None else residual.stride()[:3])),
        KERNEL=kernel,
        STRIDE=stride,
        ACTIVATION=activation,
        HAS_RESIDUAL=residual is not None,
        **flags,
        **is_even(c, oc, config),
        **config,
        enable_fp_fusion=True,
    )
    # second stage of the reduction; PyTorch's sum has one order
    return dy, *(None if sums is None else sums.sum(0) for sums in (dscale, dshift)), dresidual


def conv_norm_act_bwd(dout, x, weight, scale, shift, residual, out, stride, activation, output_mask):
    """Return the gradients of x, weight, scale, shift, residual; those not in ``output_mask`` are empty."""
    if out.numel() == 0:
        like = (x, weight, scale, shift, out)
        return tuple(t.new_zeros(t.shape) if m else x.new_empty(0) for t, m in zip(like, output_mask, strict=True))
    residual = residual if activation == "gelu" else None  # relu's sign is in out
    x, residual, weight = with_channels_last(x), with_channels_last(residual), weight_channels_last(weight)
    arguments = (dout.contiguous(), x, weight, scale, shift, residual, out.contiguous(), stride, activation)
    if output_mask[1] and output_mask[2] and activation != "gelu" and x.element_size() == 2:
        grads = _without_recomputing(*arguments, output_mask)
    else:
        dy, dscale, dshift, dresidual = _epilogue_bwd(*arguments, output_mask)
        dx, dweight = (None, None) if dy is None else convolution_backward(dy, x, weight, stride, output_mask[:2])
        grads = (dx, dweight, dscale, dshift, dresidual)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _without_recomputing(dout, x, weight, scale, shift, residual, out, stride, activation, output_mask):
    """Return the gradients without recomputing the convolution: 16 bits, with the weight's gradient wanted as well.

    The convolution is linear in its weight, so a channel's sum(dz * y) is the product of its weight with the gradient
    that dz alone gives it, and y is not needed. In fp32, a sum over a large image loses more digits in that gradient
    than a sum of dz * y does (docs/conv_norm_act.md).
    """
    _, _, dshift, dz = _epilogue_bwd(
        dout, x, weight, scale, shift, residual, out, stride, activation, [False, False, False, output_mask[3], True]
    )
    by_channel = scale[:, None, None, None]
    scaled = (weight * by_channel).to(weight.dtype) if output_mask[0] else weight
    dx, plain = convolution_backward(dz, x, scaled, stride, output_mask[:2])
    dscale, dweight = (plain * weight.float()).sum((1, 2, 3)), (plain * by_channel).to(weight.dtype)
    return dx, dweight, dscale, dshift, dz if output_mask[4] else None
