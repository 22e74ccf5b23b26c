"""``hia::linear``: schema, fake, autograd, autocast, FLOP formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ...core import autocast, cublas, native, products, registration
from ...core.backend import Backend, register_table
from . import checks, cpu
from .reference import linear_bwd_ref, linear_ref

registration.define("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", checks.check)
registration.define(
    "linear_bwd",
    "(Tensor dout, Tensor x, Tensor weight, bool[] output_mask) -> (Tensor, Tensor, Tensor)",
    checks.check_bwd,
)

_PLAIN: dict[str, Callable[..., Any]] = {"linear": linear_ref, "linear_bwd": linear_bwd_ref}


BACKENDS = register_table(
    "linear",
    Backend("cublas", _PLAIN, cublas.unsupported_reasons, cublas.unavailable_reasons),
    Backend(
        "native",
        cpu.functions(products.LARGE),
        cpu.unsupported_reasons,
        native.cpu_unavailable_reasons,
        products.slower_reasons(cpu.product_sizes),
        cpu.functions(products.EVERY),
    ),
    Backend("cpu", cpu.functions(products.BLAS), cpu.unsupported_reasons),
    Backend("reference", _PLAIN),
)
registration.implement("linear", BACKENDS)
registration.implement("linear_bwd", BACKENDS)


@registration.fake("linear")
def _fwd_fake(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@registration.fake("linear_bwd")
def _bwd_fake(dout, x, weight, output_mask):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, output_mask, strict=True))


def _setup_context(ctx, inputs, output):
    x, weight, _bias = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dout):
    mask = list(ctx.needs_input_grad)
    grads = torch.ops.hia.linear_bwd(dout, *ctx.saved_tensors, mask)
    return tuple(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))


registration.differentiate("linear", _backward, _setup_context)
registration.refuse_double_backward("linear", "linear_bwd")
autocast.register_autocast(registration.overload("linear"), cast=("x", "weight", "bias"))


@register_flop_formula(torch.ops.hia.linear)
def _flops(x_shape, weight_shape, *args, **kwargs):
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.hia.linear_bwd)
def _bwd_flops(dout_shape, x_shape, weight_shape, output_mask, **kwargs):
    return 2 * sum(output_mask[:2]) * x_shape[0] * weight_shape[0] * weight_shape[1]
