"""``hia::conv_norm_act``: schema, fake, autograd, autocast, FLOP formula."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.flop_counter import register_flop_formula

from ...core import autocast, registration, triton_support
from ...core.backend import Backend, register_table
from ...core.products import BLAS
from . import checks, cpu, cudnn, native
from .layout import PACK
from .reference import conv_norm_act_bwd_ref, conv_norm_act_ref

registration.define(
    "conv_norm_act",
    "(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, int stride, str activation) -> Tensor",
    checks.check,
)
registration.define(
    "conv_norm_act_bwd",
    "(Tensor dout, Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, Tensor out,"
    " int stride, str activation, bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    checks.check_bwd,
)
# inference with packed weights, whose scale is folded in; pad_rows=False: the caller's strip brings its own rows
registration.define(
    "conv_norm_act_packed",
    "(Tensor x, Tensor weight, Tensor shift, Tensor? residual, int stride, str activation, bool pad_rows) -> Tensor",
    checks.check_packed,
)
registration.define(
    "conv_norm_act_packed_",
    "(Tensor(a!) residual, Tensor x, Tensor weight, Tensor shift, int stride, str activation, bool pad_rows) -> ()",
    checks.check_packed_inplace,
)
registration.define(
    "conv_norm_act_packed_out",
    "(Tensor(a!) out, Tensor x, Tensor weight, Tensor shift, int stride, str activation, bool pad_rows) -> ()",
    checks.check_packed_out,
)

_TRITON = "hia_kernels.ops.conv_norm_act.triton"


def _triton_unsupported(function, x, **rest):
    return triton_support.device_reasons(x)


_BACKWARD = {"conv_norm_act_bwd": triton_support.lazy(f"{_TRITON}_bwd", "conv_norm_act_bwd")}
BACKENDS = register_table(
    "conv_norm_act",
    Backend(
        "cudnn",
        {"conv_norm_act": cudnn.conv_norm_act_fwd, **_BACKWARD},
        cudnn.unsupported_reasons,
        cudnn.unavailable_reasons,
        cudnn.slower_reasons,
    ),
    Backend(
        "triton",
        {"conv_norm_act": triton_support.lazy(f"{_TRITON}_fwd", "conv_norm_act_fwd"), **_BACKWARD},
        _triton_unsupported,
        triton_support.unavailable_reasons,
    ),
    Backend(
        "native",
        {
            "conv_norm_act": native.conv_norm_act_fwd,
            "conv_norm_act_bwd": native.conv_norm_act_bwd,
            "conv_norm_act_packed": native.conv_norm_act_packed,
            "conv_norm_act_packed_": native.conv_norm_act_packed_inplace,
            "conv_norm_act_packed_out": native.conv_norm_act_packed_out,
            PACK: native.LAYOUT,
        },
        native.unsupported_reasons,
        native.unavailable_reasons,
        native.slower_reasons,
    ),
    Backend(
        "cpu",
        {
            "conv_norm_act": partial(cpu.conv_norm_act_fwd, BLAS),
            "conv_norm_act_bwd": partial(cpu.conv_norm_act_bwd, BLAS),
            "conv_norm_act_packed": cpu.conv_norm_act_packed,
            "conv_norm_act_packed_": cpu.conv_norm_act_packed_inplace,
            "conv_norm_act_packed_out": cpu.conv_norm_act_packed_out,
            PACK: cpu.LAYOUT,
        },
        cpu.unsupported_reasons,
        cpu.unavailable_reasons,
    ),
    Backend("reference", {"conv_norm_act": conv_norm_act_ref, "conv_norm_act_bwd": conv_norm_act_bwd_ref}),
)
registration.implement("conv_norm_act", BACKENDS)
registration.implement("conv_norm_act_bwd", BACKENDS)
registration.implement("conv_norm_act_packed", BACKENDS)
registration.implement("conv_norm_act_packed_", BACKENDS)
registration.implement("conv_norm_act_packed_out", BACKENDS)


@registration.fake("conv_norm_act")
def _fwd_fake(x, weight, scale, shift, residual, stride, activation):
    n, ih, iw, _ = x.shape
    return x.new_empty(n, (ih - 1) // stride + 1, (iw - 1) // stride + 1, weight.shape[0])


@registration.fake("conv_norm_act_packed")
def _packed_fake(x, weight, shift, residual, stride, activation, pad_rows):
    n, ih, iw, _ = x.shape
    rows = ih - 1 if pad_rows else ih - native.kernel_size(weight.shape)
    return x.new_empty(n, rows // stride + 1, (iw - 1) // stride + 1, weight.shape[0])


@registration.fake("conv_norm_act_packed_", "conv_norm_act_packed_out")
def _packed_into_fake(into, x, weight, shift, stride, activation, pad_rows):
    return None


@registration.fake("conv_norm_act_bwd")
def _bwd_fake(dout, x, weight, scale, shift, residual, out, stride, activation, output_mask):
    like = (x, weight, scale, shift, out)
    return tuple(
        tensor.new_empty(tensor.shape if wanted else 0, dtype=tensor.dtype if wanted else x.dtype)
        for tensor, wanted in zip(like, output_mask, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, weight, scale, shift, residual, ctx.stride, ctx.activation = inputs
    # full activations, kept only where the backward reads them: relu sees its sign in the output
    kept_residual = residual if ctx.activation == "gelu" else None
    kept_output = output if ctx.activation == "relu" else None
    ctx.save_for_backward(x, weight, scale, shift, kept_residual, kept_output)


def _backward(ctx, dout):
    mask = list(ctx.needs_input_grad[:5])
    *saved, out = ctx.saved_tensors
    out = dout if out is None else out  # not read then; a tensor of its shape
    grads = torch.ops.hia.conv_norm_act_bwd(dout, *saved, out, ctx.stride, ctx.activation, mask)
    return (*(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), None, None)


registration.differentiate("conv_norm_act", _backward, _setup_context)
registration.refuse_double_backward("conv_norm_act", "conv_norm_act_bwd")
for _name in ("conv_norm_act_packed", "conv_norm_act_packed_", "conv_norm_act_packed_out"):
    registration.refuse_gradients(_name, "conv_norm_act")
autocast.register_autocast(registration.overload("conv_norm_act"), cast=("x", "weight", "residual"))


def _conv_flops(out_shape, weight_shape):
    """Count the convolution's, whatever the algorithm: the Winograd kernels take fewer."""
    n, oh, ow, oc = out_shape
    return 2 * n * oh * ow * oc * weight_shape[1] * native.kernel_size(weight_shape) ** 2


@register_flop_formula([torch.ops.hia.conv_norm_act, torch.ops.hia.conv_norm_act_packed])
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs):
    return _conv_flops(out_shape, weight_shape)


@register_flop_formula([torch.ops.hia.conv_norm_act_packed_, torch.ops.hia.conv_norm_act_packed_out])
def _packed_into_flops(into_shape, x, weight_shape, *args, **kwargs):
    return _conv_flops(into_shape, weight_shape)


@register_flop_formula(torch.ops.hia.conv_norm_act_bwd)
def _bwd_flops(dout_shape, x, weight_shape, sc, sh, res, out, stride, activation, output_mask, **kwargs):
    recomputed = activation == "gelu" or (output_mask[2] and not output_mask[1])
    return (int(recomputed) + sum(output_mask[:2])) * _conv_flops(dout_shape, weight_shape)
