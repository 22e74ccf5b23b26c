"""``hia::stem``: schema, fake, autograd, autocast, FLOP formula."""

from __future__ import annotations

from math import isqrt

import torch
from torch.utils.flop_counter import register_flop_formula

from ...core import autocast, registration, triton_support, varlen
from ...core.backend import Backend, register_table
from . import cpu, native
from .reference import stem_bwd_ref, stem_ref

_INPUTS = "Tensor pixels, Tensor window, Tensor mean, Tensor std, Tensor weight, Tensor scale, Tensor shift, int pool"
registration.define("stem", f"({_INPUTS}) -> Tensor")
registration.define("stem_packed", f"({_INPUTS.replace('weight', 'taps')}) -> Tensor")
registration.define(
    "stem_bwd",
    f"(Tensor dout, {_INPUTS}, bool[] output_mask, Tensor? out=None) -> (Tensor, Tensor, Tensor, Tensor)",
)

_TRITON = "hia_kernels.ops.stem.triton"
_FAR = 2**22  # elements; within a program's tile the Triton kernels count in 32 bits
PACK = "stem_pack"  # the function of a row by which it packs a weight


def _triton_unsupported(function, pixels=None, weight=None, taps=None, **rest):
    if function == PACK:
        return triton_support.device_reasons(weight)
    weight = taps if weight is None else weight
    found = triton_support.device_reasons(pixels)
    if weight.dtype == torch.float64 and pixels.dtype != torch.float64:
        found += triton_support.device_reasons(weight)
    if max(pixels.stride(1), pixels.stride(2)) > _FAR:
        found.append(f"rows and columns of pixels must lie at most {_FAR} elements apart, got {pixels.stride()}")
    return found


BACKENDS = register_table(
    "stem",
    Backend(
        "triton",
        {
            "stem": triton_support.lazy(f"{_TRITON}_fwd", "stem_fwd"),
            "stem_packed": triton_support.lazy(f"{_TRITON}_fwd", "stem_packed_fwd"),
            "stem_bwd": triton_support.lazy(f"{_TRITON}_bwd", "stem_bwd"),
            PACK: triton_support.lazy(f"{_TRITON}_pack", "pack_taps"),
        },
        _triton_unsupported,
        triton_support.unavailable_reasons,
    ),
    Backend("native", {"stem": native.stem_fwd}, native.unsupported_reasons, native.unavailable_reasons),
    Backend("cpu", {"stem": cpu.stem_fwd, "stem_bwd": cpu.stem_bwd}, cpu.unsupported_reasons, cpu.unavailable_reasons),
    Backend("reference", {"stem": stem_ref, "stem_bwd": stem_bwd_ref}),
)


def _check_values(window, **rest):
    if not varlen.check_values_now(window):
        return
    for image, (low, high) in enumerate(window.tolist()):
        if not abs(high - low) > 0 or abs(high - low) == float("inf"):
            raise ValueError(
                f"hia::stem: window must hold two different finite values per image, got ({low}, {high}) "
                f"for image {image}"
            )


registration.implement("stem", BACKENDS, check=_check_values)
registration.implement("stem_packed", BACKENDS, check=_check_values)
registration.implement("stem_bwd", BACKENDS)


def _half(size):
    return (size - 1) // 2 + 1  # of any odd kernel with stride 2 and padding K // 2


@torch.library.register_fake("hia::stem")
def _fwd_fake(pixels, window, mean, std, weight, scale, shift, pool):
    n, height, width, _ = pixels.shape
    height, width = _half(height), _half(width)
    if pool == 3:
        height, width = _half(height), _half(width)
    return weight.new_empty(n, height, width, scale.shape[0])


@torch.library.register_fake("hia::stem_packed")
def _packed_fake(*args):
    return _fwd_fake(*args)


@torch.library.register_fake("hia::stem_bwd")
def _bwd_fake(dout, pixels, window, mean, std, weight, scale, shift, pool, output_mask, out=None):
    like = (pixels, weight, scale, shift)
    return tuple(
        tensor.new_empty(tensor.shape if wanted else 0, dtype=tensor.dtype if wanted else weight.dtype)
        for tensor, wanted in zip(like, output_mask, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.pool = inputs
    # without a pool it tells the CPU's backward where the ReLU passed; the next convolution keeps it anyway
    kept_output = output if ctx.pool == 1 and output.device.type == "cpu" else None
    ctx.save_for_backward(*tensors, kept_output)


def _backward(ctx, dout):
    needs = ctx.needs_input_grad
    mask = [needs[0], needs[4], needs[5], needs[6]]
    *saved, out = ctx.saved_tensors
    grads = torch.ops.hia.stem_bwd(dout, *saved, ctx.pool, mask, out)
    dpixels, dweight, dscale, dshift = (grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))
    return dpixels, None, None, None, dweight, dscale, dshift, None


registration.differentiate("stem", _backward, _setup_context)
registration.refuse_double_backward("stem", "stem_bwd")
# Not the pixels: they are normalised in fp32 before anything is rounded.
autocast.register_autocast(registration.overload("stem"), cast=("weight",))


def _conv_flops(pixels_shape, weight_shape):
    n, height, width, _ = pixels_shape
    oc, channels, kernel, _ = weight_shape
    return 2 * n * _half(height) * _half(width) * oc * channels * kernel * kernel


@register_flop_formula(torch.ops.hia.stem)
def _flops(pixels_shape, window, mean, std, weight_shape, *args, **kwargs):
    return _conv_flops(pixels_shape, weight_shape)


@register_flop_formula(torch.ops.hia.stem_packed)
def _packed_flops(pixels_shape, window, mean, std, taps_shape, *args, **kwargs):
    _, taps, out_channels = taps_shape
    kernel = isqrt(taps) - 1
    return _conv_flops(pixels_shape, (out_channels, 3, kernel, kernel))


@register_flop_formula(torch.ops.hia.stem_bwd)
def _bwd_flops(
    dout, pixels_shape, window, mean, std, weight_shape, scale, shift, pool, output_mask, out=None, **kwargs
):
    """Count the forward once more, which a kept output saves the CPU."""
    return (1 + sum(output_mask[:2])) * _conv_flops(pixels_shape, weight_shape)
