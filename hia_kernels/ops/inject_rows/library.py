"""``hia::inject_rows`` and ``hia::inject_rows_``: schema, fake, autograd, autocast, FLOP formula."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from ...core import autocast, native, products, registration, triton_support
from ...core.backend import Backend, register_table
from . import checks, cpu
from .reference import inject_rows_bwd_ref, inject_rows_inplace_ref, inject_rows_ref

registration.define(
    "inject_rows", "(Tensor hidden, Tensor update, Tensor weight, Tensor? bias, Tensor row_idx) -> Tensor", checks.check
)
registration.define(
    "inject_rows_",
    "(Tensor(a!) hidden, Tensor update, Tensor weight, Tensor? bias, Tensor row_idx) -> ()",
    checks.check_inplace,
)
registration.define(
    "inject_rows_bwd",
    "(Tensor dout, Tensor update, Tensor weight, Tensor row_idx, bool[] output_mask) -> (Tensor, Tensor, Tensor)",
    checks.check_bwd,
)

_TRITON = "hia_kernels.ops.inject_rows.triton"
# docs/inject_rows.md, "Implemented, tried": below it a launch and a pass over the update cost more than the product
FUSED_FLOPS = 2**33
FUSED_FLOPS_FP32 = 2**28  # without matrix instructions our product is far behind cuBLAS's


def _triton_unsupported(function, hidden=None, dout=None, **rest):
    return triton_support.device_reasons(dout if hidden is None else hidden)  # may be wider than the update


def fused_is_slower(rows, channels, dim, dtype):
    """Return why cuBLAS before an addition is taken to be faster than one kernel, by sizes alone."""
    flops, limit = 2 * rows * channels * dim, FUSED_FLOPS_FP32 if dtype == torch.float32 else FUSED_FLOPS
    return [f"the product is {flops} FLOPs, more than {limit}: cublas is the better at it"] if flops > limit else []


def _fused_slower(function, update, weight, **rest):
    return fused_is_slower(update.shape[0], weight.shape[0], weight.shape[1], update.dtype)


_BACKWARD = {"inject_rows_bwd": triton_support.lazy(f"{_TRITON}_bwd", "inject_rows_bwd")}  # of both: cuBLAS's products
BACKENDS = register_table(
    "inject_rows",
    Backend(
        "triton",
        {
            "inject_rows": triton_support.lazy(f"{_TRITON}_fwd", "inject_rows_fwd"),
            "inject_rows_": triton_support.lazy(f"{_TRITON}_fwd", "inject_rows_inplace"),
            **_BACKWARD,
        },
        _triton_unsupported,
        triton_support.unavailable_reasons,
        _fused_slower,
    ),
    Backend(
        "cublas",
        {
            "inject_rows": triton_support.lazy(f"{_TRITON}_fwd", "inject_rows_cublas_fwd"),
            "inject_rows_": triton_support.lazy(f"{_TRITON}_fwd", "inject_rows_cublas_inplace"),
            **_BACKWARD,
        },
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
    Backend(
        "reference",
        {
            "inject_rows": inject_rows_ref,
            "inject_rows_": inject_rows_inplace_ref,
            "inject_rows_bwd": inject_rows_bwd_ref,
        },
    ),
)


registration.implement("inject_rows", BACKENDS, values=checks.check_values)
registration.implement("inject_rows_", BACKENDS, values=checks.check_values)
registration.implement("inject_rows_bwd", BACKENDS, values=checks.check_values)


@registration.fake("inject_rows")
def _fwd_fake(hidden, update, weight, bias, row_idx):
    return hidden.new_empty(hidden.shape)


@registration.fake("inject_rows_")
def _inplace_fake(hidden, update, weight, bias, row_idx):
    return None


@registration.fake("inject_rows_bwd")
def _bwd_fake(dout, update, weight, row_idx, output_mask):
    shapes = (update.shape, weight.shape, weight.shape[:1])
    return tuple(update.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, output_mask, strict=True))


def _setup_context(ctx, inputs, output):
    _hidden, update, weight, _bias, row_idx = inputs
    ctx.save_for_backward(update, weight, row_idx)


def _backward(ctx, dout):
    update, weight, row_idx = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[1:4])
    grads = torch.ops.hia.inject_rows_bwd(dout, update, weight, row_idx, mask)
    dupdate, dweight, dbias = (grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))
    return dout, dupdate, dweight, dbias, None


registration.differentiate("inject_rows", _backward, _setup_context)
registration.refuse_double_backward("inject_rows", "inject_rows_bwd")
registration.refuse_gradients("inject_rows_", "inject_rows")
# hidden keeps its dtype: it is the residual stream, which autocast leaves in fp32.
for _name in ("inject_rows", "inject_rows_"):
    autocast.register_autocast(registration.overload(_name), cast=("update", "weight", "bias"))


@register_flop_formula([torch.ops.hia.inject_rows, torch.ops.hia.inject_rows_])
def _flops(hidden_shape, update_shape, weight_shape, *args, **kwargs):
    return 2 * update_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.hia.inject_rows_bwd)
def _bwd_flops(dout_shape, update_shape, weight_shape, row_idx_shape, output_mask, **kwargs):
    return 2 * sum(output_mask[:2]) * update_shape[0] * weight_shape[0] * weight_shape[1]
