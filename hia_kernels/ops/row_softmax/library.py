"""``hia::row_softmax`` and ``hia::row_softmax_``: schema, fake, autograd, FLOP formula. Autocast leaves them alone."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from ...core import registration, triton_support
from ...core.backend import Backend, register_table
from . import checks
from .reference import row_softmax_bwd_ref, row_softmax_inplace_ref, row_softmax_ref

registration.define(
    "row_softmax", "(Tensor scores, float scale, ScalarType? out_dtype=None) -> (Tensor, Tensor)", checks.check
)
registration.define("row_softmax_", "(Tensor(a!) scores, float scale) -> Tensor", checks.check_inplace)
registration.define(
    "row_softmax_bwd", "(Tensor dp, Tensor p, float scale, Tensor? dlse=None) -> Tensor", checks.check_bwd
)

_TRITON = "hia_kernels.ops.row_softmax.triton"


def _triton_unsupported(function, scores=None, p=None, **rest):
    return triton_support.device_reasons(p if scores is None else scores)  # p: dp may be wider


BACKENDS = register_table(
    "row_softmax",
    Backend(
        "triton",
        {
            "row_softmax": triton_support.lazy(f"{_TRITON}_fwd", "row_softmax_fwd"),
            "row_softmax_": triton_support.lazy(f"{_TRITON}_fwd", "row_softmax_inplace"),
            "row_softmax_bwd": triton_support.lazy(f"{_TRITON}_bwd", "row_softmax_bwd"),
        },
        _triton_unsupported,
        triton_support.unavailable_reasons,
    ),
    Backend(
        "reference",
        {
            "row_softmax": row_softmax_ref,
            "row_softmax_": row_softmax_inplace_ref,
            "row_softmax_bwd": row_softmax_bwd_ref,
        },
    ),
)
for _name in ("row_softmax", "row_softmax_", "row_softmax_bwd"):
    registration.implement(_name, BACKENDS)


def _lse_fake(scores):
    return scores.new_empty(scores.shape[0], dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)


@registration.fake("row_softmax")
def _fwd_fake(scores, scale, out_dtype=None):
    return scores.new_empty(scores.shape, dtype=out_dtype or scores.dtype), _lse_fake(scores)


@registration.fake("row_softmax_")
def _inplace_fake(scores, scale):
    return _lse_fake(scores)


@registration.fake("row_softmax_bwd")
def _bwd_fake(dp, p, scale, dlse=None):
    return p.new_empty(p.shape)


def _setup_context(ctx, inputs, output):
    scores, ctx.scale = inputs[:2]
    ctx.scores_dtype = scores.dtype
    ctx.save_for_backward(output[0])


def _backward(ctx, dp, dlse):
    (p,) = ctx.saved_tensors
    dscores = torch.ops.hia.row_softmax_bwd(dp, p, ctx.scale, dlse)
    return dscores.to(ctx.scores_dtype), None, None


registration.differentiate("row_softmax", _backward, _setup_context)
registration.refuse_double_backward("row_softmax", "row_softmax_bwd")
registration.refuse_gradients("row_softmax_", "row_softmax")


@register_flop_formula([torch.ops.hia.row_softmax, torch.ops.hia.row_softmax_, torch.ops.hia.row_softmax_bwd])
def _flops(*args, **kwargs):
    return 0  # no products; torch's counter counts nothing else
