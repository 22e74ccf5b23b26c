"""``hia::stem``: schema, fake, autograd, autocast, FLOP formula."""

from __future__ import annotations

from math import isqrt

import torch
from torch.utils.flop_counter import register_flop_formula

from ...core import autocast, registration, triton_support
from ...core.backend import Backend, register_table
from . import checks, cpu, native
from .checks import output_size
from .reference import stem_bwd_ref, stem_ref

_INPUTS = "Tensor pixels, Tensor window, Tensor mean, Tensor std, Tensor weight, Tensor scale, Tensor shift, int pool"
registration.define("stem", f"({_INPUTS}) -> Tensor", checks.check)
registration.define("stem_packed", f"({_INPUTS.replace('weight', 'taps')}) -> Tensor", checks.check_packed)
registration.define(
    "stem_bwd",
    f"(Tensor dout, {_INPUTS}, bool[] output_mask, Tensor? out=None) -> (Tensor, Tensor, Tensor, Tensor)",
    checks.check_bwd,
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


registration.implement("stem", BACKENDS, values=checks.check_values)
registration.implement("stem_packed", BACKENDS, values=checks.check_values)
registration.implement("stem_bwd", BACKENDS, values=checks.check_values)


@registration.fake("stem", "stem_packed")
def _fwd_fake(pixels, window, mean, std, weight, scale, shift, pool):
    n, height, width, _ = pixels.shape
    return weight.new_empty(n, output_size(height, pool), output_size(width, pool), scale.shape[0])


@registration.fake("stem_bwd")
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
registration.refuse_gradients("stem_packed", "stem")
# Not the pixels: they are normalised in fp32 before anything is rounded.
autocast.register_autocast(registration.overload("stem"), cast=("weight",))


def _conv_flops(pixels_shape, weight_shape):
    n, height, width, _ = pixels_shape
    oc, channels, kernel, _ = weight_shape
    return 2 * n * output_size(height, 1) * output_size(width, 1) * oc * channels * kernel * kernel


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
