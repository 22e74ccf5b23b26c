"""``hia::latent_attention``: schema, fake, autograd, autocast, FLOP formula."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from ...core import autocast, devices, native, products, registration, triton_support
from ...core.backend import Backend, register_table
from . import blocked, checks
from .reference import latent_attention_bwd_ref, latent_attention_ref

registration.define(
    "latent_attention",
    "(Tensor q, Tensor latent, SymInt[] lengths, float softmax_scale) -> (Tensor, Tensor)",
    checks.check,
)
registration.define(
    "latent_attention_bwd",
    "(Tensor dout, Tensor q, Tensor latent, Tensor out, Tensor lse, SymInt[] lengths, float softmax_scale)"
    " -> (Tensor, Tensor)",
    checks.check_bwd,
)


def _triton_unsupported(function, q, **rest):
    return triton_support.device_reasons(q)


def _cpu_unsupported(function, q, **rest):
    return devices.not_cpu_reasons(q)


def _native_unsupported(function, q, **rest):
    found = _cpu_unsupported(function, q)
    return [*found, "float64 is left to others"] if q.dtype == torch.float64 else found


BACKENDS = register_table(
    "latent_attention",
    Backend("triton", blocked.functions(blocked.GPU), _triton_unsupported, triton_support.unavailable_reasons),
    Backend(
        "native",
        blocked.functions(blocked.NATIVE),
        _native_unsupported,
        native.cpu_unavailable_reasons,
        products.slower_reasons(blocked.product_sizes),
        blocked.functions(blocked.NATIVE_FORCED),
    ),
    Backend("cpu", blocked.functions(blocked.CPU), _cpu_unsupported),
    Backend("reference", {"latent_attention": latent_attention_ref, "latent_attention_bwd": latent_attention_bwd_ref}),
)
registration.implement("latent_attention", BACKENDS)
registration.implement("latent_attention_bwd", BACKENDS)


@registration.fake("latent_attention")
def _fwd_fake(q, latent, lengths, softmax_scale):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=lse_dtype)


@registration.fake("latent_attention_bwd")
def _bwd_fake(dout, q, latent, *rest):
    return q.new_empty(q.shape), latent.new_empty(latent.shape)


def _setup_context(ctx, inputs, output):
    q, latent, ctx.lengths, ctx.softmax_scale = inputs
    ctx.save_for_backward(q, latent, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _dlse):
    dq, dlatent = torch.ops.hia.latent_attention_bwd(dout, *ctx.saved_tensors, ctx.lengths, ctx.softmax_scale)
    return dq, dlatent, None, None


registration.differentiate("latent_attention", _backward, _setup_context)
registration.refuse_double_backward("latent_attention", "latent_attention_bwd")
autocast.register_autocast(registration.overload("latent_attention"), cast=("q", "latent"))


@register_flop_formula(torch.ops.hia.latent_attention)
def _flops(q_shape, latent_shape, *args, **kwargs):
    return 4 * latent_shape[0] * q_shape[1] * q_shape[2]


@register_flop_formula(torch.ops.hia.latent_attention_bwd)
def _bwd_flops(dout_shape, q_shape, latent_shape, *args, **kwargs):
    return 10 * latent_shape[0] * q_shape[1] * q_shape[2]
