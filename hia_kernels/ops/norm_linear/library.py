"""``hia::norm_linear``: schema, fake, autograd, autocast, FLOP formula."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from ...core import autocast, native, products, registration, triton_support
from ...core.backend import Backend, register_table
from . import checks, cpu
from .reference import norm_linear_bwd_ref, norm_linear_ref

registration.define(
    "norm_linear",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? bias, Tensor? row_idx, float eps)"
    " -> Tensor",
    checks.check,
)
registration.define(
    "norm_linear_bwd",
    "(Tensor dout, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? row_idx, float eps,"
    " bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    checks.check_bwd,
)

_TRITON = "hia_kernels.ops.norm_linear.triton"
_MAX_CHANNELS = 16384  # of a row that a block holds whole
# docs/norm_linear.md, "Implemented, tried": where the fused kernel's second look at its rows is cheap
FUSED_PANEL = 256 * 1024  # bytes of a tile's rows
FUSED_ROWS = 64  # of such a tile
FUSED_FLOPS = 2**32
FUSED_FLOPS_FP32 = 2**28  # without matrix instructions our product is far behind cuBLAS's


def _triton_unsupported(function, x, **rest):
    reasons = triton_support.device_reasons(x)
    if x.shape[1] > _MAX_CHANNELS:
        reasons.append(f"channels must be at most {_MAX_CHANNELS}, got {x.shape[1]}")
    return reasons


def fused_is_slower(rows, channels, dim, dtype):
    """Return why cuBLAS behind a norm is taken to be faster than one kernel, by sizes alone."""
    found = []
    panel = min(rows, FUSED_ROWS) * channels * dtype.itemsize
    if panel > FUSED_PANEL:
        found.append(f"a tile's rows are {panel} bytes, more than {FUSED_PANEL}: cublas reads them once")
    flops, limit = 2 * rows * channels * dim, FUSED_FLOPS_FP32 if dtype == torch.float32 else FUSED_FLOPS
    if flops > limit:
        found.append(f"the product is {flops} FLOPs, more than {limit}: cublas is the better at it")
    return found


def _fused_slower(function, x, weight, row_idx, **rest):
    rows = x.shape[0] if row_idx is None else row_idx.shape[0]
    return fused_is_slower(rows, x.shape[1], weight.shape[0], x.dtype)


_BACKWARD = {"norm_linear_bwd": triton_support.lazy(f"{_TRITON}_bwd", "norm_linear_bwd")}  # of both: cuBLAS's products
BACKENDS = register_table(
    "norm_linear",
    Backend(
        "triton",
        {"norm_linear": triton_support.lazy(f"{_TRITON}_fwd", "norm_linear_fwd"), **_BACKWARD},
        _triton_unsupported,
        triton_support.unavailable_reasons,
        _fused_slower,
    ),
    Backend(
        "cublas",
        {"norm_linear": triton_support.lazy(f"{_TRITON}_fwd", "norm_linear_cublas_fwd"), **_BACKWARD},
        _triton_unsupported,
        triton_support.unavailable_reasons,
    ),
    Backend(
        "native",
        cpu.functions(products.LARGE),
        cpu.unsupported_reasons,
        native.cpu_unavailable_reasons,
        products.slower_reasons(cpu.product_sizes),
        cpu.functions(products.EVERY),
    ),
    Backend("cpu", cpu.functions(products.BLAS), cpu.unsupported_reasons),
    Backend("reference", {"norm_linear": norm_linear_ref, "norm_linear_bwd": norm_linear_bwd_ref}),
)


registration.implement("norm_linear", BACKENDS, values=checks.check_values)
registration.implement("norm_linear_bwd", BACKENDS, values=checks.check_values)


@registration.fake("norm_linear")
def _fwd_fake(x, norm_weight, norm_bias, weight, bias, row_idx, eps):
    rows = x.shape[0] if row_idx is None else row_idx.shape[0]
    return x.new_empty(rows, weight.shape[0])


@registration.fake("norm_linear_bwd")
def _bwd_fake(dout, x, norm_weight, norm_bias, weight, row_idx, eps, output_mask):
    norms = any(output_mask[:3])
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if output_mask[0] else x.new_empty(0),
        torch.empty_like(norm_weight) if norms else x.new_empty(0),
        torch.empty_like(norm_bias) if norms else x.new_empty(0),
        weight.new_empty(weight.shape) if output_mask[3] else x.new_empty(0),
        x.new_empty(weight.shape[0]) if output_mask[4] else x.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    x, norm_weight, norm_bias, weight, _bias, row_idx, ctx.eps = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, row_idx)


def _backward(ctx, dout):
    x, norm_weight, norm_bias, weight, row_idx = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:5])
    grads = torch.ops.hia.norm_linear_bwd(dout, x, norm_weight, norm_bias, weight, row_idx, ctx.eps, mask)
    return (*(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), None, None)


registration.differentiate("norm_linear", _backward, _setup_context)
registration.refuse_double_backward("norm_linear", "norm_linear_bwd")
autocast.register_autocast(registration.overload("norm_linear"), cast=("x", "weight", "bias"))


@register_flop_formula(torch.ops.hia.norm_linear)
def _flops(x_shape, norm_weight_shape, norm_bias_shape, weight_shape, bias_shape, row_idx_shape, *args, **kwargs):
    rows = x_shape[0] if row_idx_shape is None else row_idx_shape[0]
    return 2 * rows * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.hia.norm_linear_bwd)
def _bwd_flops(dout_shape, x_shape, norm_weight_shape, norm_bias_shape, weight_shape, row_idx, eps, output_mask, **kw):
    products = int(any(output_mask[:3])) + int(output_mask[3])
    return 2 * products * dout_shape[0] * weight_shape[0] * weight_shape[1]
