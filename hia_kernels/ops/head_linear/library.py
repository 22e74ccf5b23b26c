"""``hia::head_linear``: schema, fake, autograd, autocast, FLOP formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ...core import autocast, cublas, native, products, registration
from ...core.backend import Backend, register_table
from . import checks, cpu
from .batched import head_linear_batched, head_linear_bwd_batched
from .reference import head_linear_bwd_ref, head_linear_ref

registration.define("head_linear", "(Tensor x, Tensor weight, bool merge_heads) -> Tensor", checks.check)
registration.define(
    "head_linear_bwd",
    "(Tensor dout, Tensor x, Tensor weight, bool merge_heads, bool[] output_mask) -> (Tensor, Tensor)",
    checks.check_bwd,
)

_BATCHED: dict[str, Callable[..., Any]] = {
    "head_linear": head_linear_batched,
    "head_linear_bwd": head_linear_bwd_batched,
}


BACKENDS = register_table(
    "head_linear",
    Backend("cublas", _BATCHED, cublas.unsupported_reasons, cublas.unavailable_reasons),
    Backend(
        "native",
        cpu.functions(products.LARGE),
        cpu.unsupported_reasons,
        native.cpu_unavailable_reasons,
        products.slower_reasons(cpu.product_sizes),
        cpu.functions(products.EVERY),
    ),
    Backend("cpu", cpu.functions(products.BLAS), cpu.unsupported_reasons),
    Backend("reference", {"head_linear": head_linear_ref, "head_linear_bwd": head_linear_bwd_ref}),
)
registration.implement("head_linear", BACKENDS)
registration.implement("head_linear_bwd", BACKENDS)


@registration.fake("head_linear")
def _fwd_fake(x, weight, merge_heads):
    images, heads, rows, _ = x.shape
    dim = weight.shape[1]
    return x.new_empty((images, rows, heads * dim) if merge_heads else (images, heads, rows, dim))


@registration.fake("head_linear_bwd")
def _bwd_fake(dout, x, weight, merge_heads, output_mask):
    dx = x.new_empty(x.shape if output_mask[0] else 0)
    return dx, torch.empty_like(weight) if output_mask[1] else weight.new_empty(0)


def _setup_context(ctx, inputs, output):
    x, weight, ctx.merge_heads = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dout):
    mask = list(ctx.needs_input_grad[:2])
    grads = torch.ops.hia.head_linear_bwd(dout, *ctx.saved_tensors, ctx.merge_heads, mask)
    return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), None


registration.differentiate("head_linear", _backward, _setup_context)
registration.refuse_double_backward("head_linear", "head_linear_bwd")
autocast.register_autocast(registration.overload("head_linear"), cast=("x", "weight"))


@register_flop_formula(torch.ops.hia.head_linear)
def _flops(x_shape, weight_shape, *args, **kwargs):
    return 2 * math.prod(x_shape) * weight_shape[1]


@register_flop_formula(torch.ops.hia.head_linear_bwd)
def _bwd_flops(dout_shape, x_shape, weight_shape, merge_heads, output_mask, **kwargs):
    return 2 * sum(output_mask) * math.prod(x_shape) * weight_shape[1]
