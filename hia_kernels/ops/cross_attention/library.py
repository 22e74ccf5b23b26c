"""``hia::cross_attention`` and ``hia::cross_attention_with_lse``: schema, fake, autograd, autocast, FLOP formula."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from ...core import autocast, registration, triton_support
from ...core.backend import Backend, register_table
from . import checks, cpu, cudnn, flash_attn, measured, sdpa, xformers
from .reference import cross_attention_bwd_ref, cross_attention_ref, cross_attention_with_lse_ref

_PACKING = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale"
registration.define("cross_attention", f"(Tensor q, Tensor k, Tensor v, {_PACKING}) -> Tensor", checks.check)
registration.define(
    "cross_attention_with_lse", f"(Tensor q, Tensor k, Tensor v, {_PACKING}) -> (Tensor, Tensor)", checks.check_with_lse
)
registration.define(
    "cross_attention_bwd",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {_PACKING}) -> (Tensor, Tensor, Tensor)",
    checks.check_bwd,
)

OP = "cross_attention"
_TRITON = "hia_kernels.ops.cross_attention.triton"


def _triton_unsupported(function, q, **rest):
    return triton_support.device_reasons(q)


def _row(name, forward, with_lse, backward, *reasons):
    functions = {OP: forward, f"{OP}_with_lse": with_lse, f"{OP}_bwd": backward}
    return Backend(name, functions, *reasons)


# On a GPU, the order that auto keeps to where nothing was measured on the device: first ours, which alone gives a
# packed sequence the bits that it has alone, then newer kernels before older ones (docs/cross_attention.md).
BACKENDS = register_table(
    OP,
    _row(
        "triton",
        triton_support.lazy(f"{_TRITON}_fwd", "cross_attention_fwd"),
        triton_support.lazy(f"{_TRITON}_fwd", "cross_attention_with_lse_fwd"),
        triton_support.lazy(f"{_TRITON}_bwd", "cross_attention_bwd"),
        _triton_unsupported,
        triton_support.unavailable_reasons,
        measured.slower_reasons("triton"),
    ),
    _row(
        "flash_attn",
        flash_attn.cross_attention_fwd,
        flash_attn.cross_attention_with_lse_fwd,
        flash_attn.cross_attention_bwd,
        flash_attn.unsupported_reasons,
        flash_attn.unavailable_reasons,
        measured.slower_reasons("flash_attn"),
    ),
    _row(
        "cudnn",
        cudnn.cross_attention_fwd,
        cudnn.cross_attention_with_lse_fwd,
        cudnn.cross_attention_bwd,
        cudnn.unsupported_reasons,
        cudnn.unavailable_reasons,
        measured.slower_reasons("cudnn"),
    ),
    _row(
        "sdpa_flash",
        sdpa.flash_fwd,
        sdpa.flash_with_lse_fwd,
        sdpa.flash_bwd,
        sdpa.flash_unsupported_reasons,
        sdpa.unavailable_reasons,
        measured.slower_reasons("sdpa_flash"),
    ),
    _row(
        "xformers",
        xformers.cross_attention_fwd,
        xformers.cross_attention_with_lse_fwd,
        xformers.cross_attention_bwd,
        xformers.unsupported_reasons,
        xformers.unavailable_reasons,
        measured.slower_reasons("xformers"),
    ),
    _row(
        "sdpa_efficient",
        sdpa.efficient_fwd,
        sdpa.efficient_with_lse_fwd,
        sdpa.efficient_bwd,
        sdpa.efficient_unsupported_reasons,
        sdpa.unavailable_reasons,
        measured.slower_reasons("sdpa_efficient"),
    ),
    _row(
        "cpu",
        cpu.cross_attention_fwd,
        cpu.cross_attention_with_lse_fwd,
        cpu.cross_attention_bwd,
        cpu.unsupported_reasons,
    ),
    _row("reference", cross_attention_ref, cross_attention_with_lse_ref, cross_attention_bwd_ref),
)


registration.implement("cross_attention", BACKENDS, values=checks.check_values)
registration.implement("cross_attention_with_lse", BACKENDS, values=checks.check_values)
registration.implement("cross_attention_bwd", BACKENDS, values=checks.check_values)


@registration.fake("cross_attention")
def _fwd_fake(q, k, v, *packing):
    return q.new_empty(q.shape)


@registration.fake("cross_attention_with_lse")
def _lse_fake(q, k, v, *packing):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype)


@registration.fake("cross_attention_bwd")
def _bwd_fake(dout, dlse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.scalars = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k, *output)
    ctx.set_materialize_grads(False)  # mostly none arrives at lse, and some backends take none


def _backward(ctx, dout, dlse):
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse = ctx.saved_tensors
    packing = (cu_seqlens_q, cu_seqlens_k, *ctx.scalars)
    dout = torch.zeros_like(out) if dout is None else dout
    grads = torch.ops.hia.cross_attention_bwd(dout, dlse, q, k, v, out, lse, *packing)
    return (*grads, None, None, None, None, None)


registration.differentiate("cross_attention_with_lse", _backward, _setup_context)
# the backward needs the log-sum-exp; without it, it would have to compute the scores once more
registration.differentiate_as_first("cross_attention", "cross_attention_with_lse")
registration.refuse_double_backward("cross_attention", "cross_attention_bwd")
for _name in ("cross_attention", "cross_attention_with_lse"):
    autocast.register_autocast(registration.overload(_name), cast=("q", "k", "v"))


def _product_flops(q_shape, k_shape, max_seqlen_k):
    """Count one of the matrix products, by shapes alone.

    The values of cu_seqlens would make the count depend on data, so every query is taken to see the longest key
    sequence; exact when all key sequences have that length.
    """
    tokens_q, heads, head_dim = q_shape
    return 2 * tokens_q * min(max_seqlen_k, k_shape[0]) * heads * head_dim


@register_flop_formula([torch.ops.hia.cross_attention, torch.ops.hia.cross_attention_with_lse])
def _flops(q_shape, k_shape, v_shape, cu_q, cu_k, max_seqlen_q, max_seqlen_k, *args, **kwargs):
    return 2 * _product_flops(q_shape, k_shape, max_seqlen_k)


@register_flop_formula(torch.ops.hia.cross_attention_bwd)
def _bwd_flops(dout, dlse, q_shape, k_shape, v_shape, out, lse, cu_q, cu_k, max_seqlen_q, max_seqlen_k, *args, **kw):
    return 5 * _product_flops(q_shape, k_shape, max_seqlen_k)
