"""``hia::condition_queries``: schema, fake, autograd, autocast, FLOP formula."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from ...core import autocast, native, products, registration, triton_support
from ...core.backend import Backend, register_table
from . import checks, cpu
from .reference import condition_queries_bwd_ref, condition_queries_ref

registration.define(
    "condition_queries",
    "(Tensor hidden, Tensor row_idx, Tensor weight, Tensor? bias, Tensor queries) -> Tensor",
    checks.check,
)
registration.define(
    "condition_queries_bwd",
    "(Tensor dout, Tensor hidden, Tensor row_idx, Tensor weight, bool[] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    checks.check_bwd,
)

_TRITON = "hia_kernels.ops.condition_queries.triton"


def _triton_unsupported(function, hidden, **rest):
    return triton_support.device_reasons(hidden)


BACKENDS = register_table(
    "condition_queries",
    Backend(
        "triton",
        {
            "condition_queries": triton_support.lazy(f"{_TRITON}_fwd", "condition_queries_fwd"),
            "condition_queries_bwd": triton_support.lazy(f"{_TRITON}_bwd", "condition_queries_bwd"),
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
        {"condition_queries": condition_queries_ref, "condition_queries_bwd": condition_queries_bwd_ref},
    ),
)


registration.implement("condition_queries", BACKENDS, values=checks.check_values)
registration.implement("condition_queries_bwd", BACKENDS, values=checks.check_values)


@registration.fake("condition_queries")
def _fwd_fake(hidden, row_idx, weight, bias, queries):
    return queries.new_empty(row_idx.shape[0], *queries.shape)


@registration.fake("condition_queries_bwd")
def _bwd_fake(dout, hidden, row_idx, weight, output_mask):
    shapes = (hidden.shape, weight.shape, weight.shape[:1], dout.shape[1:])
    return tuple(hidden.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, output_mask, strict=True))


def _setup_context(ctx, inputs, output):
    hidden, row_idx, weight, _bias, _queries = inputs
    ctx.save_for_backward(hidden, row_idx, weight)


def _backward(ctx, dout):
    hidden, row_idx, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    mask = [needs[0], needs[2], needs[3], needs[4]]
    grads = torch.ops.hia.condition_queries_bwd(dout, hidden, row_idx, weight, mask)
    dhidden, dweight, dbias, dqueries = (grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))
    return dhidden, None, dweight, dbias, dqueries


registration.differentiate("condition_queries", _backward, _setup_context)
registration.refuse_double_backward("condition_queries", "condition_queries_bwd")
autocast.register_autocast(registration.overload("condition_queries"), cast=("hidden", "weight", "bias", "queries"))


@register_flop_formula(torch.ops.hia.condition_queries)
def _flops(hidden_shape, row_idx_shape, weight_shape, *args, **kwargs):
    return 2 * row_idx_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.hia.condition_queries_bwd)
def _bwd_flops(dout_shape, hidden_shape, row_idx_shape, weight_shape, output_mask, **kwargs):
    return 2 * sum(output_mask[:2]) * row_idx_shape[0] * weight_shape[0] * weight_shape[1]
