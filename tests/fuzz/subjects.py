"""The public functions that are fuzzed: how each is called by name, what it is compared with, and its contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hia_kernels
from hia_kernels.core import backend, triton_support
from hia_kernels.ops.condition_queries.reference import condition_queries_ref
from hia_kernels.ops.conv_norm_act import packed as packed_conv
from hia_kernels.ops.conv_norm_act.reference import conv_norm_act_ref
from hia_kernels.ops.cross_attention.reference import cross_attention_ref, cross_attention_with_lse_ref
from hia_kernels.ops.head_linear.reference import head_linear_ref
from hia_kernels.ops.inject_rows.reference import inject_rows_ref
from hia_kernels.ops.latent_attention.reference import latent_attention_ref
from hia_kernels.ops.linear.reference import linear_ref
from hia_kernels.ops.norm_linear.reference import norm_linear_ref
from hia_kernels.ops.row_softmax.reference import row_softmax_ref
from hia_kernels.ops.stem.packed import pack_stem, stem_packed
from hia_kernels.ops.stem.reference import stem_ref
from tests.inputs import differentiable

REFERENCE, AUTO = backend.REFERENCE, backend.AUTO


@dataclass(frozen=True)
class Subject:
    """One public function.

    Attributes:
        op: whose tables and inputs it has.
        call: takes the arguments by name.
        reference: likewise, in plain PyTorch; returns what ``call`` does.
        shapes: of the tensors by symbols: one symbol is one size, a digit is itself.
        cast: arguments that autocast casts.
        optional: tensors that may be None.
        written: the argument that is overwritten; ``call`` returns it.
        packed: whether it takes weights packed beforehand: no gradients, no autocast.
    """

    op: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: dict[str, str]
    cast: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    written: str = ""
    packed: bool = False

    @property
    def differentiable(self) -> tuple[str, ...]:
        """List the arguments that it has gradients of."""
        return () if self.packed or self.written else differentiable(self.op)


def _attention(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Give a reference the default scale."""

    def call(softmax_scale: float | None, **arguments: Any) -> Any:
        head_dim = arguments["q"].shape[-1]
        return reference(softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale, **arguments)

    return call


def _conv_packed(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: int,
    activation: str,
    pad_rows: bool,
) -> Tensor:
    packed = packed_conv.pack_conv(weight, scale, shift, stride)
    return packed_conv.conv_norm_act_packed(x, packed, residual, activation, pad_rows)


def _conv_packed_inplace(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, **options: Any
) -> Tensor:
    packed = packed_conv.pack_conv(weight, scale, shift, options["stride"])
    return packed_conv.conv_norm_act_packed_(residual, x, packed, options["activation"], options["pad_rows"])


def _conv_packed_out(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, **options: Any
) -> Tensor:
    """Write to ``residual``, whose values don't count."""
    packed = packed_conv.pack_conv(weight, scale, shift, options["stride"])
    return packed_conv.conv_norm_act_packed_out(residual, x, packed, options["activation"], options["pad_rows"])


def _conv_packed_ref(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: int,
    activation: str,
    pad_rows: bool,
) -> Tensor:
    """Compute without zero rows above and below: the scale is folded into the weight, which is rounded."""
    padding = [weight.shape[-1] // 2 if pad_rows else 0, weight.shape[-1] // 2]
    folded = (weight * scale[:, None, None, None]).to(weight.dtype)
    z = F.conv2d(x.permute(0, 3, 1, 2), folded, stride=stride, padding=padding).permute(0, 2, 3, 1).to(scale.dtype)
    z = z + shift
    if residual is not None:
        z = z + residual.to(z.dtype)
    act = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu}[activation]
    return act(z).to(x.dtype).contiguous()


def _conv_packed_out_ref(residual: Tensor, **arguments: Any) -> Tensor:
    return _conv_packed_ref(residual=None, **arguments)


def _inject_inplace(hidden: Tensor, **arguments: Any) -> Tensor:
    out = hia_kernels.inject_rows_(hidden, **arguments)
    assert out is hidden, "inject_rows_ must return hidden itself"
    return out


def _softmax_inplace(scores: Tensor, scale: float, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    lse = hia_kernels.row_softmax_(scores, scale)
    return scores, lse


def _softmax_inplace_ref(scores: Tensor, scale: float, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    return row_softmax_ref(scores, scale)


def _stem_packed(
    pixels: Tensor, window: Tensor, mean: Tensor, std: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, pool: int
) -> Tensor:
    return stem_packed(pixels, window, pack_stem(weight, mean, std, scale, shift, pool))


_ATTENTION = {
    "q": "Tq H D",
    "k": "Tk H D",
    "v": "Tk H D",
    "cu_seqlens_q": "B+1",
    "cu_seqlens_k": "B+1",
}
_CONV = {"x": "N IH IW C", "weight": "OC C K K", "scale": "OC", "shift": "OC", "residual": "N OH OW OC"}
_INJECT = {"hidden": "T C", "update": "R D", "weight": "C D", "bias": "C", "row_idx": "R"}
_STEM = {
    "pixels": "N IH IW CP",
    "window": "N 2",
    "mean": "3",
    "std": "3",
    "weight": "OC 3 K K",
    "scale": "OC",
    "shift": "OC",
}

SUBJECTS = {
    "condition_queries": Subject(
        "condition_queries",
        hia_kernels.condition_queries,
        condition_queries_ref,
        {"hidden": "T C", "row_idx": "B", "weight": "D C", "bias": "D", "queries": "M D"},
        ("hidden", "weight", "bias", "queries"),
        ("bias",),
    ),
    "conv_norm_act": Subject(
        "conv_norm_act",
        hia_kernels.conv_norm_act,
        conv_norm_act_ref,
        _CONV,
        ("x", "weight", "residual"),
        ("residual",),
    ),
    "conv_norm_act_packed": Subject(
        "conv_norm_act", _conv_packed, _conv_packed_ref, _CONV, optional=("residual",), packed=True
    ),
    "conv_norm_act_packed_": Subject(
        "conv_norm_act", _conv_packed_inplace, _conv_packed_ref, _CONV, written="residual", packed=True
    ),
    "conv_norm_act_packed_out": Subject(
        "conv_norm_act", _conv_packed_out, _conv_packed_out_ref, _CONV, written="residual", packed=True
    ),
    "cross_attention": Subject(
        "cross_attention",
        hia_kernels.cross_attention,
        _attention(cross_attention_ref),
        _ATTENTION,
        ("q", "k", "v"),
    ),
    "cross_attention_with_lse": Subject(
        "cross_attention",
        hia_kernels.cross_attention_with_lse,
        _attention(cross_attention_with_lse_ref),
        _ATTENTION,
        ("q", "k", "v"),
    ),
    "head_linear": Subject(
        "head_linear",
        hia_kernels.head_linear,
        head_linear_ref,
        {"x": "n H R C", "weight": "H D C"},
        ("x", "weight"),
    ),
    "inject_rows": Subject(
        "inject_rows", hia_kernels.inject_rows, inject_rows_ref, _INJECT, ("update", "weight", "bias"), ("bias",)
    ),
    "inject_rows_": Subject(
        "inject_rows",
        _inject_inplace,
        inject_rows_ref,
        _INJECT,
        ("update", "weight", "bias"),
        ("bias",),
        written="hidden",
    ),
    "latent_attention": Subject(
        "latent_attention",
        hia_kernels.latent_attention,
        lambda **arguments: latent_attention_ref(**arguments)[0],
        {"q": "n G E", "latent": "T E"},
        ("q", "latent"),
    ),
    "linear": Subject(
        "linear",
        hia_kernels.linear,
        linear_ref,
        {"x": "R C", "weight": "D C", "bias": "D"},
        ("x", "weight", "bias"),
        ("bias",),
    ),
    "norm_linear": Subject(
        "norm_linear",
        hia_kernels.norm_linear,
        norm_linear_ref,
        {"x": "T C", "norm_weight": "C", "norm_bias": "C", "weight": "D C", "bias": "D", "row_idx": "R"},
        ("x", "weight", "bias"),
        ("bias", "row_idx"),
    ),
    "row_softmax": Subject("row_softmax", hia_kernels.row_softmax, row_softmax_ref, {"scores": "R N"}),
    "row_softmax_": Subject("row_softmax", _softmax_inplace, _softmax_inplace_ref, {"scores": "R N"}, written="scores"),
    "stem": Subject("stem", hia_kernels.stem, stem_ref, _STEM, ("weight",)),
    "stem_packed": Subject("stem", _stem_packed, stem_ref, _STEM, packed=True),
}


def backends_of(function: str) -> tuple[str, ...]:
    """List what may serve a function in this process: rows that can run here, and the choice among them.

    Where Triton's interpreter runs, that is its rows alone: the others are fuzzed in a process without it.
    """
    subject = SUBJECTS[function]
    interpreted = triton_support.interpreted()
    if subject.packed and (function == "stem_packed") != interpreted:
        return ()
    rows = [row for row in backend.TABLES[subject.op].backends if not row.unavailable_reasons()]
    if interpreted:
        return tuple(row.name for row in rows if row.name not in ("native", "cpu", REFERENCE))
    names = tuple(row.name for row in rows if not (subject.packed and row.name == REFERENCE))
    return (AUTO, *names)
