"""Channels-last convolution with a folded norm, a residual and an activation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...core import autocast, backend
from ...core.checks import FLOATS, check_choice, check_devices, check_dtypes, check_shapes
from . import cpu, native
from . import library as _library  # noqa: F401  (defines the ops)

ACTIVATIONS = ("none", "relu", "gelu")
KEPT_LAYOUTS = 3
NATIVE = b"native"  # the key of the native kernels' layout
KEPT_SIZES = 1024


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    stride: int = 1,
    activation: str = "relu",
) -> Tensor:
    """``act(scale * conv(x) + shift + residual)`` on channels-last images; zero padding of ``K // 2``.

    A ResNet-50 step of the high-resolution encoder with its batch-norm folded into ``scale`` and ``shift``
    (a convolution's bias b goes into the shift as ``scale * b``). Scale, shift, residual and activation in
    fp32.

    Args:
        x:        [N, IH, IW, C] fp32, fp16, bf16 or fp64.
        weight:   [OC, C, K, K], K 1 or 3, dtype of ``x`` (``nn.Conv2d``'s layout).
        scale:    [OC] fp32 (fp64 with fp64 ``x``).
        shift:    [OC], dtype of ``scale``.
        residual: [N, OH, OW, OC], dtype of ``x``, or None.
        stride:   1 or 2, in pixels; OH = (IH - 1) // stride + 1.
        activation: "none", "relu" or "gelu" (exact, with erf).

    Returns:
        [N, OH, OW, OC] contiguous, dtype of ``x``; differentiable in every tensor.

    Raises:
        ValueError: shapes, devices, stride or activation that don't fit. TypeError: unsupported or mixed dtypes.

    Cost: 2*N*OH*OW*OC*C*K*K FLOPs; (N*IH*IW*C + OC*C*K*K + N*OH*OW*OC) * itemsize bytes, and the residual's.
    """
    op = "conv_norm_act"
    check_choice(op, "stride", stride, (1, 2))
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_dtypes(op, x=(x, FLOATS))
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_dtypes(op, weight=(weight, x.dtype), residual=(residual, x.dtype))
    check_dtypes(op, cast=False, scale=(scale, statistics), shift=(shift, statistics))
    dims = check_shapes(
        op,
        x=(x, "N IH IW C"),
        weight=(weight, "OC C K K"),
        scale=(scale, "OC"),
        shift=(shift, "OC"),
        residual=(residual, "N OH OW OC"),
    )
    check_devices(op, x=x, weight=weight, scale=scale, shift=shift, residual=residual)
    check_choice(op, "weight's K", dims["K"], (1, 3))
    if dims["IH"] < 1 or dims["IW"] < 1:
        raise ValueError(f"hia::{op}: x must hold at least one pixel, got shape {list(x.shape)}")
    if residual is not None:
        expected = [(dims["IH"] - 1) // stride + 1, (dims["IW"] - 1) // stride + 1]
        if [dims["OH"], dims["OW"]] != expected:
            raise ValueError(
                f"hia::{op}: residual must have the output's size {expected}, got {[dims['OH'], dims['OW']]}"
            )
    return torch.ops.hia.conv_norm_act(x, weight, scale, shift, residual, stride, activation)


@dataclass(frozen=True)
class PackedConv:
    """Inference weights of one step, made by :func:`pack_conv`: plain values, no parameters.

    The native kernels have one layout. oneDNN chooses one by the image's size, and reading another one's is slower than
    packing again; most sizes share one of a few layouts, so the last of those are kept, and which size takes which is
    remembered.

    Attributes:
        weight: [OC, C, K, K], the caller's: not copied, and read again for a new layout.
        scale: [OC].
        shift: [OC].
        stride: 1 or 2.
        layouts: scaled weights by oneDNN's description of their layout, at most :data:`KEPT_LAYOUTS`, oldest first.
            Such a tensor can't be indexed or saved.
        kinds: which of them images take, by height, width and whether rows are padded; at most :data:`KEPT_SIZES`.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    stride: int
    layouts: dict[bytes, Tensor] = field(default_factory=dict, repr=False)
    kinds: dict[tuple[int, int, bool], bytes] = field(default_factory=dict, repr=False)

    def layout(self, height: int, width: int, pad_rows: bool = True) -> Tensor:
        """The scaled weight as the backend of images of this size wants it."""
        if self.is_native():
            if NATIVE not in self.layouts:
                self.layouts[NATIVE] = native.pack_weight(self.weight, self.scale, self.stride)
            return self.layouts[NATIVE]
        size = (height, width, pad_rows)
        kind = self.kinds.get(size)
        found = None if kind is None else self.layouts.pop(kind, None)
        if kind is None or found is None:
            packed = cpu.pack_weight(self.weight, self.scale, self.stride, (height, width), pad_rows)
            kind = cpu.layout_of(packed) or repr(size).encode()
            found = self.layouts.pop(kind, packed)
            while len(self.layouts) >= KEPT_LAYOUTS:
                self.layouts.pop(next(iter(self.layouts)))
            if len(self.kinds) >= KEPT_SIZES:
                self.kinds.clear()
            self.kinds[size] = kind
        self.layouts[kind] = found
        return found

    def is_native(self) -> bool:
        """Whether the native kernels serve it now; they write into a tensor that they are given."""
        if backend.requested_backend() not in ("auto", "native") or native.unavailable_reasons():
            return False
        return not native.packing_unsupported_reasons(self.weight)

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        kept = sum(layout.numel() * layout.element_size() for layout in self.layouts.values())
        return kept + self.scale.nbytes + self.shift.nbytes


def packing_reasons(weight: Tensor) -> list[str]:
    """Why packed weights can't serve a call with ``weight`` now; empty if they can.

    They serve oneDNN and the native kernels: fp32 and bf16 on the CPU, no other backend forced, no autocast, outside
    torch.compile (which packs by itself when its freezing is on).
    """
    found = cpu.unavailable_reasons() + cpu.packing_unsupported_reasons(weight)
    forced = backend.requested_backend()
    if forced not in ("auto", "native", "cpu"):
        found.append(f"HIA_BACKEND={forced} is forced")
    if autocast.is_enabled("cpu"):
        found.append("autocast is on")
    if torch.compiler.is_compiling():
        found.append("torch.compile is tracing")
    return found


def pack_conv(weight: Tensor, scale: Tensor, shift: Tensor, stride: int = 1) -> PackedConv:
    """Fold the scale into the weight and lay it out for oneDNN once for a size, instead of in every call.

    Args:
        weight: [OC, C, K, K] fp32 or bf16 on the CPU; it must not change afterwards.
        scale:  [OC] fp32, likewise.
        shift:  [OC] fp32, likewise.
        stride: 1 or 2.

    Returns:
        For :func:`conv_norm_act_packed`.

    Raises:
        NotImplementedError: see :func:`packing_reasons`. ValueError, TypeError: as :func:`conv_norm_act`.
    """
    op = "conv_norm_act_packed"
    check_choice(op, "stride", stride, (1, 2))
    check_dtypes(op, weight=(weight, FLOATS))
    reasons = packing_reasons(weight)
    if reasons:
        raise NotImplementedError(f"hia::{op}: weight can't be packed: " + "; ".join(reasons))
    check_dtypes(op, scale=(scale, torch.float32), shift=(shift, torch.float32))
    dims = check_shapes(op, weight=(weight, "OC C K K"), scale=(scale, "OC"), shift=(shift, "OC"))
    check_devices(op, weight=weight, scale=scale, shift=shift)
    check_choice(op, "weight's K", dims["K"], (1, 3))
    return PackedConv(weight.detach(), scale.detach(), shift.detach(), stride)


def _check_packed(
    op: str, x: Tensor, packed: PackedConv, residual: Tensor | None, activation: str, pad: bool, name: str = "residual"
) -> None:
    check_choice(op, "activation", activation, ACTIVATIONS)
    out_channels, channels, kernel, _ = packed.weight.shape
    dtypes: dict[str, Any] = {"x": (x, packed.weight.dtype), name: (residual, packed.weight.dtype)}
    check_dtypes(op, **dtypes)
    shapes: dict[str, Any] = {"x": (x, f"N IH IW {channels}"), name: (residual, f"N OH OW {out_channels}")}
    check_shapes(op, **shapes)
    if x.shape[1] < (1 if pad else kernel) or x.shape[2] < 1:
        raise ValueError(f"hia::{op}: x must hold at least one output's rows and columns, got shape {list(x.shape)}")
    rows = x.shape[1] - 1 if pad else x.shape[1] - kernel
    expected = [x.shape[0], rows // packed.stride + 1, (x.shape[2] - 1) // packed.stride + 1]
    if residual is not None and list(residual.shape[:3]) != expected:
        raise ValueError(
            f"hia::{op}: {name} must have the output's [N, OH, OW] {expected}, got {list(residual.shape[:3])}"
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual)):
        raise RuntimeError(f"hia::{op}: x and {name} must not be part of a gradient graph; use conv_norm_act")


def conv_norm_act_packed(
    x: Tensor, packed: PackedConv, residual: Tensor | None = None, activation: str = "relu", pad_rows: bool = True
) -> Tensor:
    """:func:`conv_norm_act` with weights packed beforehand. For inference.

    Args:
        x:        [N, IH, IW, C], dtype of the weight that was packed.
        packed:   of :func:`pack_conv`.
        residual: [N, OH, OW, OC], dtype of ``x``, or None.
        activation: "none", "relu" or "gelu".
        pad_rows: False: no zero rows above and below, for a strip that brings its neighbours' rows;
            OH = (IH - K) // stride + 1 then.

    Returns:
        [N, OH, OW, OC] contiguous.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit. RuntimeError: gradients are recorded.
        NotImplementedError: another backend is forced.
    """
    _check_packed("conv_norm_act_packed", x, packed, residual, activation, pad_rows)
    weight = packed.layout(x.shape[1], x.shape[2], pad_rows)
    return torch.ops.hia.conv_norm_act_packed(x, weight, packed.shift, residual, packed.stride, activation, pad_rows)


def conv_norm_act_packed_(
    residual: Tensor, x: Tensor, packed: PackedConv, activation: str = "relu", pad_rows: bool = True
) -> Tensor:
    """:func:`conv_norm_act_packed` that writes its result over ``residual``, contiguous and apart from ``x``.

    Returns:
        ``residual`` itself.
    """
    op = "conv_norm_act_packed_"
    _check_packed(op, x, packed, residual, activation, pad_rows)
    if not residual.is_contiguous():
        raise ValueError(f"hia::{op}: residual must be contiguous, got strides {list(residual.stride())}")
    weight = packed.layout(x.shape[1], x.shape[2], pad_rows)
    torch.ops.hia.conv_norm_act_packed_(residual, x, weight, packed.shift, packed.stride, activation, pad_rows)
    return residual


def conv_norm_act_packed_out(
    out: Tensor, x: Tensor, packed: PackedConv, activation: str = "relu", pad_rows: bool = True
) -> Tensor:
    """:func:`conv_norm_act_packed` into a tensor that exists, contiguous and apart from ``x``.

    Fresh memory costs page faults.
    oneDNN makes its own result and copies it; :meth:`PackedConv.is_native` tells.

    Returns:
        ``out`` itself.
    """
    op = "conv_norm_act_packed_out"
    _check_packed(op, x, packed, out, activation, pad_rows, "out")
    if not out.is_contiguous():
        raise ValueError(f"hia::{op}: out must be contiguous, got strides {list(out.stride())}")
    weight = packed.layout(x.shape[1], x.shape[2], pad_rows)
    torch.ops.hia.conv_norm_act_packed_out(out, x, weight, packed.shift, packed.stride, activation, pad_rows)
    return out
