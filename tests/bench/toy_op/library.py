"""``hia::row_dot``: schema, fake, autograd, FLOP formula, the table of backends."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from hia_kernels.core import registration, triton_support
from hia_kernels.core.backend import Backend, register_table

from . import checks
from .reference import row_dot_ref

registration.define("row_dot", "(Tensor x, Tensor y) -> Tensor", checks.check)


def _triton_unsupported(function, x, y):
    return triton_support.device_reasons(x)


BACKENDS = register_table(
    "row_dot",
    Backend(
        "triton",
        {"row_dot": triton_support.lazy("tests.bench.toy_op.triton_fwd", "row_dot_fwd")},
        _triton_unsupported,
        triton_support.unavailable_reasons,
    ),
    Backend("reference", {"row_dot": row_dot_ref}),
)
registration.implement("row_dot", BACKENDS)


@registration.fake("row_dot")
def _fwd_fake(x, y):
    return x.new_empty(x.shape[0])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    x, y = ctx.saved_tensors
    return dout[:, None] * y, dout[:, None] * x


registration.differentiate("row_dot", _backward, _setup_context)


@register_flop_formula(torch.ops.hia.row_dot)
def _flops(x_shape, *args, **kwargs):
    return 2 * x_shape[0] * x_shape[1]
